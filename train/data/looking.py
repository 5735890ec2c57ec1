"""Shared by the checks of all tasks: opening pictures in threads, and reporting what was left out."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from hybridzoo.train.data.report import How, OnBad, Report, Split, first_process
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import DARK, SAMPLE, Found, MaskError, looked_at, shown_size
from hybridzoo.train.notes import Notes

FULL_DECODES = (
    SAMPLE  # in a larger set, this many evenly spaced pictures are decoded; of the others, only both ends are read
)
BAR_AFTER = 2.0  # seconds
LINE_AFTER = 25.0  # seconds between lines if no bar is shown
Result = TypeVar("Result")


def existing_folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{what} {path} {'is not a folder' if path.exists() else 'does not exist'}")
    return path


def note_left_out(found: Found, folder: Path, notes: Notes | None) -> None:
    if notes is None:
        return
    for path in found.hidden:
        notes.add("hidden or system files or folders: left out", path)
    for path in found.others:
        notes.add("files without a picture's suffix, or circular links: left out", path)


def add_split(
    report: Report, split: str, images: list[Path], labels: list[Any], shows: list[set[str]], counts: Counter[str]
) -> None:
    sizes = Counter(shown_size(path)[0] for path in looked_at(images))
    by_class = {name: counts[name] for name in report.classes}
    report.splits.append(Split(split, images, sizes, by_class, labels, shows))


def say_absent(absent: Sequence[str], where: str, split: str, notes: Notes) -> None:
    if absent:
        lost = "it cannot be learned" if split == "train" else "it is not measured"
        notes.say(f"{listed(absent)} never occurs {where}: {lost}")


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return "class " + ", ".join(map(repr, names[:20])) + more


def readable(
    splits: Mapping[str, Sequence[Path]],
    how: How,
    report: Report,
    check: Callable[[Path, bool], int | None],
    what: str = "checking images",
) -> set[Path]:
    """The images that can be decoded. Others are an error, or are noted and added to `report.skipped`.

    Images of a large split that are not opened count as good.

    Args:
        splits: images of each split.
        check: (image, whether to decode it) -> the highest value if it is deep, see `Picture.highest`.

    Raises:
        UserError: an image that cannot be decoded, unless they are skipped; no image can be decoded; dark 16-bit
            images.
        MaskError: a wrong label.
    """
    if how.holdout is not None and {"train", "val"} <= splits.keys():
        held, kept = len(splits["val"]), len(splits["train"])
        report.notes.say(
            f"{held:,} of {held + kept:,} training images are held out for validation (fraction "
            f"{how.holdout.fraction:g}, seed {how.holdout.seed})"
        )
    images: list[Path] = []
    for split, all_of_it in splits.items():
        chosen = looked_at(all_of_it)
        images += chosen
        if len(chosen) < len(all_of_it):
            report.notes.say(
                f"{len(chosen):,} of {len(all_of_it):,} images of {split}, evenly spaced, are checked now, "
                "the others when they are loaded"
            )
    stride = max(1, math.ceil(len(images) / FULL_DECODES))
    bad: list[tuple[Path, str]] = []
    deep: list[tuple[int, Path]] = []

    def work(index: int) -> int | UserError | None:
        try:
            return check(images[index], index % stride == 0)
        except MaskError:
            raise
        except UserError as error:
            return error

    for path, result in zip(images, _each(len(images), work, what), strict=True):
        if isinstance(result, UserError):
            bad.append((path, str(result)))
        elif result is not None:
            deep.append((result, path))
    if bad:
        _settle(bad, len(images), how.on_bad, report)
    highest = max(deep)[0] if deep else 0
    if 0 < highest < 4 * DARK and how.white_value is None:
        guess = 2 ** highest.bit_length() - 1
        raise UserError(
            f"{len(deep)} of {len(images)} images hold 16 bits and no value above {highest}, so that all of them would "
            f"be dark; the first: {deep[0][1]}; set white_value={guess}, or what else is white in them"
        )
    left = {path for path, _ in bad}
    return {path for paths in splits.values() for path in paths if path not in left}


def _settle(bad: Sequence[tuple[Path, str]], count: int, on_bad: OnBad, report: Report) -> None:
    first = bad[0][1]
    if on_bad == "stop":
        more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise UserError(f"image cannot be read: {first}{more}; replace it, or train without with --on-bad-image skip")
    if len(bad) == count:
        raise UserError(f"none of {count} images can be read; the first: {first}")
    if first_process():
        print(f"skipping {len(bad)} of {count} images, which cannot be read; the first: {first}")
    report.skipped += [path for path, _ in bad]


def _each(count: int, work: Callable[[int], Result], what: str) -> Iterator[Result]:
    """`work(index)` for 0..count-1 in threads (decoding releases the GIL), in order, with a progress bar if it takes
    long."""
    chunk = 64
    parts = [range(first, min(first + chunk, count)) for first in range(0, count, chunk)]
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=count)
    began = said = time.monotonic()
    done = 0
    pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2))
    try:
        for results in pool.map(lambda part: [work(index) for index in part], parts):
            if not bar.live.is_started and time.monotonic() - began > BAR_AFTER:
                bar.start()
            bar.update(task, advance=len(results))
            done += len(results)
            if not console.is_terminal and first_process() and time.monotonic() - said > LINE_AFTER:
                said = time.monotonic()
                print(f"data: {what}, {done:,} of {count:,}", flush=True)
            yield from results
    finally:
        bar.stop()
        pool.shutdown(cancel_futures=True)
