"""Measurements in separate processes, controlled by messages.

Each network gets its own process, so that memory held by malloc, threads and compiled code of one network do not affect
the next. If the system kills a process because memory ran out, the others continue. Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any, Protocol

from hybridzoo.train.errors import explain, reason

SMALLER = "use a smaller --batch-size or --img-size, or --dtype bfloat16"
# With argv of our command, importing hybridzoo.train loads nothing that is needed for training.
PROGRAM = "import sys; sys.argv = ['hybridzoo']; from hybridzoo.train.bench.processes import serve; serve()"


class Failed(Exception):
    """The measurement failed; the message is one line that says why."""


class Measured(Protocol):
    """The interface of a measured object: `Worker` in another process, `Here` in this one."""

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the object; arguments and result are JSON.

        Raises:
            Failed: the method raised an error, or the process ended.
        """

    def close(self) -> None:
        """Free the object's resources."""


class Worker:
    """An object in its own process.

    Args:
        target: "module:class".
        threads: PyTorch's threads there; default PyTorch's own choice.
        arguments: passed to the class.

    Raises:
        Failed: see `call`.
    """

    def __init__(self, target: str, threads: int | None = None, **arguments: Any) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        try:
            self._ask(dict(target=target, threads=threads, arguments=arguments))
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        return self._ask(dict(method=method, arguments=arguments))

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _ask(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["value"]

    def _ended(self) -> str:
        code = self._process.wait()
        if code == -9:
            return f"the system ended its process, probably because memory ran out: {SMALLER}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"its process ended (exit code {code}){f': {lines[-1]}' if lines else ''}"


class Here:
    """An object in this process."""

    def __init__(self, target: str, threads: int | None = None, **arguments: Any) -> None:
        try:
            self._object = _make(target, arguments)
        except Exception as error:
            raise Failed(say(error)) from error

    def call(self, method: str, **arguments: Any) -> Any:
        try:
            return json.loads(json.dumps(getattr(self._object, method)(**arguments)))
        except Exception as error:
            raise Failed(say(error)) from error

    def close(self) -> None:
        self._object = None


def say(error: BaseException) -> str:
    """An error as one line, for a row's reason."""
    text = str(error)
    if "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}:
        return f"out of GPU memory: {SMALLER}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"out of memory: {SMALLER}"
    return " ".join((explain(error) or reason(error)).split())


def serve() -> None:
    """Main loop of the other process: answers messages until the pipe closes. Output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    made: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if made is None:
                _settle(message["threads"])
                made, value = _make(message["target"], message["arguments"]), None
            else:
                value = getattr(made, message["method"])(**message["arguments"])
            answer = dict(value=value)
        except Exception as error:
            answer = dict(error=say(error))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _settle(threads: int | None) -> None:
    """Flush denormal numbers to zero. PyTorch's threads inherit this, so it is set before they start.

    The activations of untrained networks reach such numbers, on which processors are slow.
    """
    import torch

    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)


def _make(target: str, arguments: dict[str, Any]) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)
