"""Every kernel by Triton's interpreter: the tests of the files beside this one that compute, in a process for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_tests import not_interpreted, run_interpreted

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
FILES = [*sorted(HERE.glob("test_*_triton.py")), HERE / "test_depthwise.py"]


@not_interpreted
@pytest.mark.alone
@pytest.mark.timeout(3600)  # it is many tests, and more of them in exhaustive runs
def test_under_the_interpreter(request):
    """In one process, which imports PyTorch and Triton once."""
    assert len(FILES) == 4
    run_interpreted(request, FILES, at_least=130)
