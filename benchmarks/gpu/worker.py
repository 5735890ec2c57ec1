"""A process that runs one task after the other: what fails, hangs or breaks the GPU's context ends with it."""

from __future__ import annotations

import gc
import importlib
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from benchmarks.gpu.importable import make_importable
from benchmarks.gpu.rows import Row, Task


def resolve(task: Task) -> Iterator[Row | None]:
    module, name = task.run.split(":")
    return getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)(**task.args)


@contextmanager
def settings(task: Task) -> Iterator[None]:
    """The task's environment variables, inside."""
    before = {name: os.environ.get(name) for name, _ in task.settings}
    os.environ.update(dict(task.settings))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def error_row(error: BaseException) -> Row:
    lines = traceback.format_exception(error)
    return dict(error=f"{type(error).__name__}: {error}"[:2000], traceback="".join(lines)[-2500:])


def settle(dry: bool) -> None:
    """Between tasks. Raises where the GPU's context is lost."""
    import torch

    gc.collect()
    torch._dynamo.reset()
    if not dry:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def work(pipe: Connection) -> None:
    """Messages in: a task, then "go" when it may measure. Out: "hello", then "ready", rows, "end" or "lost"."""
    warnings.filterwarnings("ignore")
    make_importable()
    dry = os.environ.get("TRITON_INTERPRET") == "1"
    import torch

    torch.set_num_threads(1)
    importlib.import_module("benchmarks.gpu.parts")
    importlib.import_module("hybridzoo.kernels")
    if not dry:
        torch.zeros(1, device="cuda")
    pipe.send(("hello", None))
    while True:
        task = pipe.recv()
        if task is None:
            return
        try:
            with settings(task):
                for row in resolve(task):
                    if row is None:
                        pipe.send(("ready", None))
                        pipe.recv()
                    else:
                        pipe.send(("row", row))
        except Exception as error:
            pipe.send(("row", error_row(error)))
        try:
            settle(dry)
        except Exception:
            pipe.send(("lost", None))
            return
        pipe.send(("end", None))
