"""The tables of the command line: fitted to a terminal, plain text in a pipe."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from hybridzoo.train import names
from hybridzoo.train.plain import printable

if TYPE_CHECKING:
    from hybridzoo.checkpoints import Card
    from hybridzoo.checkpoints.verification import Verification
    from hybridzoo.train.layouts import Report
    from hybridzoo.train.model_info import Facts, Summary
    from hybridzoo.train.names import Recipe
    from hybridzoo.train.predict import Prediction


MOST_CLASSES = 25  # that a table of results lists
_WIDEST = 10_000  # columns: on a pipe no line is ever wrapped


def show(table: Table) -> None:
    """Print to stdout: fitted to a terminal, or plain text without trailing blanks into a pipe or file."""
    console = Console(markup=False)
    if console.is_terminal:
        console.print(table)
        return
    plain = Console(file=StringIO(), width=_WIDEST, color_system=None, force_terminal=False, markup=False)
    with plain.capture() as captured:
        plain.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr while something runs that has no steps to count; nothing where stderr is no terminal."""
    with Console(stderr=True, markup=False).status(Text(f"{printable(what)} ...")):
        yield


def models(summaries: Iterable["Summary"]) -> Table:
    """One line per model; top-1 in per cent, input as the side or height x width in pixels."""
    table = new_table("name!", "family", "params>", "input>", "top-1>", "licence")
    for s in summaries:
        short = (s.licence or "-").partition(" (")[0]  # `info` has the remark in brackets
        top1 = f"{s.top1:.1f}" if s.top1 is not None else "-"
        table.add_row(s.name, s.family, millions(s.params), pixels(s.input_size), top1, short)
    return table


def recipes(entries: Iterable["Recipe"]) -> Table:
    """One line per recipe: name, task, network, published score and its source, weights that it starts from."""
    table = new_table("name!", "task", "network", "published", "weights")
    for entry in entries:
        if entry.published:
            score = f"{entry.score} ({entry.source})" if entry.score else "-"
            table.add_row(entry.name, entry.task, entry.network, score, entry.weights or "from scratch")
        elif entry.name in names.EVERYDAY:
            table.add_row(entry.name, entry.task, "any: --model NAME", "your data", "the network's own")
        else:
            table.add_row(entry.name, entry.task, "biformer_tiny", "embedded digits", "see --help of train")
    return table


def model(f: "Facts") -> Table:
    """Everything known about one model, one fact per line; unpublished values are a dash."""
    published = [f"{name} {value:g} %" for name, value in (("top-1", f.top1), ("top-5", f.top5)) if value is not None]
    lines = {
        "model": f.name,
        "family": f.family,
        "paper": f.paper,
        "parameters": f"{f.params:,} ({millions(f.params)})",
        "MACs": f"{f.macs / 1e9:.2f} G for {pixels(f.input_size)} px",
        "strides": " ".join(map(str, f.strides)),
        "channels": " ".join(map(str, f.channels)),
        "input": f"{f.input_size[0]} x {f.input_size[1]} x {f.input_size[2]}, {f.interpolation}, crop {f.crop_pct:g}",
        "mean": " ".join(f"{value:g}" for value in f.mean),
        "std": " ".join(f"{value:g}" for value in f.std),
        "classes": f"{f.num_classes:,}",
        "published": ", ".join(published),
        "source": f.source,
        "licence": f.licence,
        "tags": " ".join(f.tags),
        "weights": f.weights,
        "notes": f.notes,
    }
    return _facts(lines)


def scores(values: dict[str, float]) -> Table:
    """One line per metric."""
    table = new_table("metric", "value>")
    for name, value in values.items():
        table.add_row(name, f"{value:.4g}")
    return table


def classes(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per class with all its values; of many classes, those with the lowest first score."""
    counts = {"class", "images", "objects", "pixels"}
    columns = list(rows[0])
    first = next(name for name in columns if name not in counts)
    table = new_table("class", *(f"{name}>" for name in columns[1:]))
    shown = rows
    if len(rows) > MOST_CLASSES:
        measured = [row for row in rows if row[first] is not None]
        shown = sorted(measured, key=lambda row: row[first])[:MOST_CLASSES]
        table.title = f"the {len(shown)} of {len(rows)} classes with the lowest {first}"
    for row in shown:
        cells = [row["class"]]
        for name in columns[1:]:
            value = row[name]
            cells.append("-" if value is None else f"{value:,}" if name in counts else f"{value:.3g}")
        table.add_row(*map(printable, cells))
    return table


def predictions(found: Sequence["Prediction"], source: Path | None = None) -> Table:
    """A line per class (classification, segmentation) or object (detection) of each image, best first.

    Args:
        found: in one image each.
        source: the folder below which the images are named; default their own names.
    """
    task = found[0].task
    if task == "detection":
        masks = any(p.areas is not None for p in found)
        table = new_table("image", "class", "score>", "left>", "top>", "right>", "bottom>", *["mask px>"] * masks)
    else:
        table = new_table("image", "class", "share>" if task == "segmentation" else "probability>")
    for p in found:
        name = str(p.image.relative_to(source)) if source and p.image != source else p.name or p.image.name
        if not p.labels:
            table.add_row(printable(name), "nothing found")
        for i, (label, score) in enumerate(zip(p.labels, p.scores, strict=True)):
            cells = [
                printable(name),
                printable(label),
                f"{score:.2f}" if task == "detection" else f"{100 * score:.1f} %",
            ]
            if p.boxes is not None:
                cells += [f"{edge:.0f}" for edge in p.boxes[i].tolist()]
                if p.areas is not None:
                    cells.append(str(p.areas[i]))
            table.add_row(*cells)
    return table


def data(report: "Report") -> Iterator[Table]:
    """Two tables of a checked data folder: its splits, and its classes with their numbers in each."""
    splits = new_table("split", "images>", "sizes")
    for split in report.splits:
        common = [f"{w}x{h} ({n})" for (w, h), n in split.sizes.most_common(3)]
        more = f", {len(split.sizes) - 3} more" if len(split.sizes) > 3 else ""
        splits.add_row(split.name, str(len(split.images)), ", ".join(common) + more)
    yield splits
    what = "objects" if report.task == "detection" else "images"
    columns = [f"{split.name} {what}>" for split in report.splits]
    columns += [f"{split.name} pixels>" for split in report.splits if split.pixels]
    classes = new_table("id>", "class", *columns)
    for number, name in enumerate(report.classes):
        cells = [str(split.counts[name]) for split in report.splits]
        for split in report.splits:
            if split.pixels:
                cells.append(f"{100 * split.pixels[name] / max(1, sum(split.pixels.values())):.1f} %")
        classes.add_row(str(number), name, *cells)
    yield classes


def weights(found: Iterable[tuple["Card", Path | None]]) -> Table:
    """One line per published file; its size if known, and whether it is on this machine."""
    table = new_table("weights!", "link", "size>", "here", "licence")
    for card, path in found:
        size = path.stat().st_size if path is not None else card.size
        licence = (card.licence or "-").partition(" (")[0]
        link = "-" if card.status == "none" else card.status
        table.add_row(card.name, link, megabytes(size), "yes" if path is not None else "-", licence)
    return table


def verification(f: "Verification") -> Table:
    """The results of a check of a weights file, one per line."""
    compared = {
        "card": "as the card says",
        "record": "as at its first download",
        "hub": "as in the hub's cache",
        "": "nothing to compare with",
    }[f.known]
    lines = {
        "file": str(f.path),
        "weights": f.name,
        "size": f"{f.size:,} bytes",
        "SHA-256": f.sha256,
        "known": compared,
        "values": f"{f.values:,}",
        "verdict": "good" if f.ok else f"{len(f.problems)} wrong",
    }
    return _facts(lines)


def megabytes(size: int | None) -> str:
    """52428800 -> "52.4 MB"; None -> "-"."""
    return "-" if size is None else f"{size / 1e6:.1f} MB"


def millions(count: int) -> str:
    """13142760 -> "13.1 M"."""
    return f"{count / 1e6:.1f} M"


def pixels(input_size: Sequence[int]) -> str:
    """(3, 224, 224) -> "224"; (3, 256, 320) -> "256x320"."""
    _, height, width = input_size
    return str(height) if height == width else f"{height}x{width}"


class _Plain(Table):
    """A table whose cells are plain text: names may contain rich's markup, e.g. "tank [/mk2]"."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells), **options)


def _facts(lines: Mapping[str, str | None]) -> Table:
    """One fact per line, label and value; unknown values are a dash."""
    table = _Plain(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines.items():
        table.add_row(label, value or "-")
    return table


def new_table(*columns: str) -> Table:
    """An empty table; a title's last letter says more: ">" a column of numbers, "!" names that stay on one line."""
    table = _Plain(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), collapse_padding=True, header_style="bold"
    )
    for title in columns:
        justify: Literal["left", "right"] = "right" if title.endswith(">") else "left"
        # In a narrow terminal, fold text instead of cutting it.
        table.add_column(title.rstrip(">!"), justify=justify, no_wrap=title[-1] in ">!", overflow="fold")
    return table
