"""What the tests cost: CPU seconds, which a loaded machine does not change, children that ended included.

A plugin (see `conftest.py`): at the end the seconds by folder and the dearest tests are printed; `--cpu-seconds FILE`
writes all of them. A module's fixtures count with the test that asked first.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

DEAREST = 12


def spent() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class CpuSeconds:
    def __init__(self) -> None:
        self.last = spent()
        self.tests: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self.last = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = spent()
        report.cpu_seconds = now - self.last  # an attribute travels from a worker to the process that reports
        self.last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += getattr(report, "cpu_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        if file := config.getoption("cpu_seconds"):
            Path(file).write_text(json.dumps({test: round(s, 3) for test, s in self.tests.most_common()}, indent=0))
        if self.tests.total() < 60:
            return
        folders: Counter[str] = Counter()
        for test, seconds in self.tests.items():
            folders[test.partition("::")[0].rpartition("/")[0]] += seconds
        write = terminalreporter.write_line
        terminalreporter.section(f"{self.tests.total():.0f} CPU seconds in tests", sep="=")
        for name, seconds in [*folders.most_common(), *self.tests.most_common(DEAREST)]:
            write(f"{seconds:7.1f}  {name.partition('@')[0]}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", metavar="FILE", help="write the CPU seconds of every test to FILE (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuSeconds(), "cpu-seconds")
