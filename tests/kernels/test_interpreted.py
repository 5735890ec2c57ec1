"""Every kernel by Triton's interpreter: the tests of the files beside this one that compute, in processes for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_tests import not_interpreted, run_interpreted

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
FILES = [*sorted(HERE.glob("test_*_triton.py")), HERE / "test_depthwise.py"]
PARTS = 2  # each takes as long as some files together


@not_interpreted
@pytest.mark.alone
@pytest.mark.parametrize("part", range(PARTS), ids=lambda part: f"part {part + 1} of {PARTS}")
def test_under_the_interpreter(request, part):
    assert len(FILES) == 4
    run_interpreted(request, FILES, at_least=58, part=(part, PARTS))
