"""Measures networks side by side: each in its own process, with the calls of all interleaved."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hybridzoo.train import model_info, names
from hybridzoo.train.bench import rows as results
from hybridzoo.train.bench.processes import Failed, Measured, Worker
from hybridzoo.train.bench.rows import Row
from hybridzoo.train.errors import UserError

AT_ONCE = 8  # networks measured together; more are measured group by group
TARGET = "hybridzoo.train.bench.network:Network"
Tell = Callable[[str, float], None]  # what is being done, and the fraction that is done


@dataclasses.dataclass(frozen=True)
class Settings:
    """How networks are run.

    Attributes:
        device, dtype, batch, size, compiled, fused, channels_last: see `network.Network`.
        train: also measure a training step.
        threads: PyTorch's threads on a CPU; default PyTorch's own choice.
        turns: for each network.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 8
    size: tuple[int, int] | None = None
    compiled: bool = False
    fused: bool = False
    channels_last: bool = False
    train: bool = False
    threads: int | None = None
    turns: int = 9

    @property
    def ways(self) -> tuple[str, ...]:
        return ("inference", "training") if self.train else ("inference",)


def find(patterns: Iterable[str]) -> list[str]:
    """The requested networks, each once: our or timm's names, parts of our names, or patterns with * and ?.

    A pattern that matches none of our names is matched with timm's.

    Raises:
        UserError: one of them matches nothing; the message has the nearest names.
    """
    ours, found = names.our_models(), list[str]()
    for word in patterns:
        arch = word.partition(".")[0]
        if arch in ours or arch in names.timm_models():
            names.check_model(word)
            if "." in word and arch not in ours:
                model_info.timms_tags(word)
            found.append(word)
            continue
        try:
            found += names.matching(word, ours, "model", "type: hybridzoo list")
        except UserError:
            if not any(sign in word for sign in "*?["):
                names.check_model(word)  # its error names the nearest models
            found += names.matching(word, sorted({*ours, *names.timm_models()}), "model", "type: hybridzoo list")
    return list(dict.fromkeys(found))


def measure(
    wanted: Sequence[str],
    settings: Settings,
    machine: Row,
    tell: Tell = lambda what, share: None,
    make: Callable[..., Measured] | None = None,
) -> Iterator[list[Row]]:
    """Rows of each network, group by group: `inference`, `latency` (a single image) and optionally `training`.

    Args:
        wanted: names.
        settings: how to run them.
        machine: device and versions, which every row contains.
        tell: called with the progress.
        make: creates the object that measures a network; default `processes.Worker`, an own process.
    """
    jobs = [(name, way) for name in wanted for way in settings.ways]
    steps = len(jobs) * (settings.turns + 1)
    done = 0

    def count(what: str) -> None:
        nonlocal done
        done += 1
        tell(what, done / steps)

    size = max(1, AT_ONCE // len(settings.ways)) * len(settings.ways)
    for first in range(0, len(jobs), size):
        yield _group(jobs[first : first + size], settings, machine, count, make or Worker)


def _group(
    jobs: Sequence[tuple[str, str]],
    settings: Settings,
    machine: Row,
    count: Callable[[str], None],
    make: Callable[..., Measured],
) -> list[Row]:
    runs = [_Run(name, way, settings, machine) for name, way in jobs]
    try:
        for run in runs:
            run.start(make)
            count(f"{run.name}: {run.failed or 'ready'}")
        for turn in range(settings.turns):
            for run in runs:
                run.turn()
                count(f"turn {turn + 1} of {settings.turns}")
    finally:
        for run in runs:
            run.close()
    return [row for run in runs for row in run.rows()]


class _Run:
    """One network measured in one way, and its results."""

    def __init__(self, name: str, way: str, settings: Settings, machine: Row) -> None:
        self.name, self.way, self.settings, self.machine = name, way, settings, machine
        self.samples: dict[str, list[tuple[float, float]]] = {way: []}
        if way == "inference":
            self.samples["latency"] = []
        size = settings.size
        self.found: Row = {} if size is None else dict(shape=dict(height=size[0], width=size[1]))
        self.failed = ""
        self._measured: Measured | None = None

    def start(self, make: Callable[..., Measured]) -> None:
        given = ("device", "dtype", "batch", "size", "compiled", "fused", "channels_last")
        arguments: dict[str, Any] = {key: getattr(self.settings, key) for key in given}
        try:
            self._measured = make(TARGET, self.settings.threads, name=self.name, way=self.way, **arguments)
            self.found = self._measured.call("prepare")
        except Failed as error:
            self._fail(error)

    def turn(self) -> None:
        for way, samples in self.samples.items():
            if self._measured is not None:
                try:
                    samples.append(tuple(self._measured.call("turn", way=way)))
                except Failed as error:
                    self._fail(error)

    def _fail(self, error: Failed) -> None:
        self.failed = str(error)
        self.close()

    def close(self) -> None:
        if self._measured is not None:
            self._measured.close()
        self._measured = None

    def rows(self) -> Iterator[Row]:
        for way, samples in self.samples.items():
            batch = 1 if way == "latency" else self.settings.batch
            mode = "compiled" if self.settings.compiled else "eager"
            row: Row = dict(part="models", op=self.name, form="fused" if self.settings.fused else "as created")
            row |= dict(way=way, mode=mode, batch=batch, dtype=self.settings.dtype) | self.found | self.machine
            if way == "latency":
                row.pop("peak_mib", None)
            if self.failed:
                yield row | dict(error=self.failed)
                continue
            wall, cpu = zip(*samples, strict=True)
            row |= results.timed(wall, cpu if "threads" in row else ())
            yield row | dict(images_per_s=round(batch / statistics.median(wall), 3))
