"""Other processes for tests: forks of this one, which has imported everything, and so seconds cheaper than new ones."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch


class Fork:
    """A process of its own session that runs a function.

    It exits with 0, with what a `SystemExit` says, or with 1 after any other exception, whose traceback is printed.

    Args:
        run: what it does.
        log: the file that gets what it prints.
        cwd: its working directory; default this process's.
        environment: further variables; None takes one away.
    """

    def __init__(
        self, run: Callable[[], object], log: Path, *, cwd: Path | None = None, **environment: str | None
    ) -> None:
        if torch.cuda.is_available():
            pytest.skip("a fork cannot use its parent's GPU")
        self.log, self._code = log, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _run(run, log, cwd, environment)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, seconds: float = 300) -> int:
        """The exit code, once it ends; it is killed if it does not in time."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.printed())
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        """It and all its children."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def together(*forks: Fork) -> list[str]:
    """What some processes print that have to end well."""
    try:
        for fork in forks:
            assert fork.wait() == 0, fork.printed()
    finally:
        for fork in forks:
            fork.kill()
    return [fork.printed() for fork in forks]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _run(run: Callable[[], object], log: Path, cwd: Path | None, environment: dict[str, str | None]) -> NoReturn:
    code: object = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, end in enumerate((os.open(os.devnull, os.O_RDONLY), file, file)):
            os.dup2(end, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        if cwd is not None:
            os.chdir(cwd)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        run()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
