"""How `make test` spreads the suite over its workers (see `conftest.py`)."""

from __future__ import annotations

import pytest


def test_a_file_stays_with_one_worker(request):
    """Else every worker makes its fixtures. pytest-xdist writes the group behind the name, where pytest lets it."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("no workers that share the files, as `make test` has them")
    assert request.node.nodeid.endswith(f"@{__file__}"), f"pytest {pytest.__version__} and pytest-xdist do not fit"
