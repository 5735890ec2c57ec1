"""Tasks that try the runner itself; they measure nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from benchmarks.gpu.rows import Row


def works() -> Iterator[Row | None]:
    yield None
    yield dict(value=1)


def fails() -> Iterator[Row | None]:
    yield None
    raise ValueError("no good")


def dies() -> Iterator[Row | None]:
    yield None
    os._exit(3)


def hangs() -> Iterator[Row | None]:
    time.sleep(1000)
    yield None
