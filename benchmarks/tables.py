"""The tables in docs/speed.md, docs/bench.md, docs/export.md and under `benchmarks/`, made from `benchmarks/results/`
and docs/exports.json, docs/int8.json.

    python -m benchmarks.tables

Writes each table between its two marks, `<!-- bench: NAME -->` and `<!-- /bench -->`, and keeps the text around it.
Draws docs/bench.png too, if its data have changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from hybridzoo.checkpoints.catalogue import find
from hybridzoo.train.bench import plot
from hybridzoo.train.bench import rows as results
from hybridzoo.train.bench.rows import Row
from hybridzoo.train.bench.tables import lines, markdown, number, shape, spread

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
FILES = [
    ROOT / "docs" / "speed.md",
    ROOT / "docs" / "bench.md",
    ROOT / "docs" / "export.md",
    HERE / "networks_cpu.md",
    HERE / "operators_cpu.md",
    HERE / "input_pipeline_cpu.md",
]
PLOT = ROOT / "docs" / "bench.png"
EXPORTS = ROOT / "docs" / "exports.json"
INT8 = ROOT / "docs" / "int8.json"
MARKED = re.compile(r"(<!-- bench: ([\w ]+) -->\n).*?(<!-- /bench -->)", re.S)
OTHERS = {"mix": "gather", "depthwise": "grouped convolution", "merging": "torchvision's deform_conv2d"}


def read(name: str) -> list[Row]:
    path = RESULTS / f"{name}.json"
    return results.read(path) if path.exists() else []


def method(rows: Sequence[Row]) -> str:
    """One line: where, with what, how often."""
    turns = sorted({row["runs"] for row in rows if "runs" in row})
    often = f"{turns[0]} to {turns[-1]}" if len(turns) > 1 else f"{turns[0]}"
    threads = sorted({row["threads"] for row in rows if "threads" in row})
    words = [" and ".join(sorted({row["device"] for row in rows}))]
    words.append(f"{' or '.join(map(str, threads))} thread{'s' * (threads != [1])}")
    words += [f"PyTorch {' and '.join(sorted({row['torch'] for row in rows}))}", "float32"]
    days = sorted({row["at"][:10] for row in rows if row.get("at")})
    words += [" to ".join(dict.fromkeys((days[0], days[-1])))] if days else []
    return f"{', '.join(words)}. Medians of {often} interleaved turns."


def networks() -> str:
    """For docs/speed.md: CPU time of the other implementation, in its faster memory layout, divided by ours."""
    rows = read("networks_cpu")
    body = []
    for name, ways in _by_way(rows).items():
        for other_form in _others(ways["inference"]):
            cells = [f"`{name}`", other_form]
            for way in ("inference", "latency"):
                forms = ways[way]
                other = _faster(forms, other_form)
                cells += [
                    "" if other is None else f"{other / forms[form]['cpu_us']:.2f}x" for form in ("ours", "fused")
                ]
            cells.append(f"{ways['inference']['ours']['cpu_us'] / ways['inference']['fused']['cpu_us']:.2f}x")
            forms = ways.get("training", {})
            other = _faster(forms, other_form)
            cells.append("" if other is None else f"{other / forms['ours']['cpu_us']:.2f}x")
            body.append(cells)
    head = ["network", "compared with", "as created", "fused", "one image, as created", "fused"]
    head += ["fused, compared with as created", "training step"]
    return f"{method(rows)}\n\n{markdown(head, body, 2)}"


def compiled() -> str:
    """For docs/speed.md: CPU time of the other implementation as created, divided by that of compiled forms."""
    rows = read("compiled_cpu")
    body = []
    for name, ways in _by_way(rows).items():
        for other_form in _others(ways["inference"]):
            cells = [f"`{name}`", other_form]
            for way in ("inference", "latency"):
                other = _faster(ways[way], other_form)
                faster = _faster(ways[way], f"{other_form}, compiled")
                times = [faster, *(ways[way][form]["cpu_us"] for form in ("ours, compiled", "fused"))]
                cells += ["" if other is None or time is None else f"{other / time:.2f}x" for time in times]
            body.append(cells)
    three = ["it, compiled", "ours, compiled", "ours, fused"]
    head = ["network", "compared with", *three, f"one image: {three[0]}", *three[1:]]
    return f"{method(rows)}\n\n{markdown(head, body, 2)}"


def networks_in_full() -> str:
    rows = read("networks_cpu")
    head = ["network", "form", "way", "batch", "ms", "quartiles", "CPU ms", "peak MiB"]
    body = []
    for row in rows:
        cells = [f"`{row['op']}`", row["form"], row["way"], str(row["batch"]), number(row["median_us"] / 1e3)]
        cells += [_quartiles(row), number(row["cpu_us"] / 1e3) if "cpu_us" in row else ""]
        body.append([*cells, f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""])
    return f"{method(rows)}\n\n{markdown(head, body, 3)}"


def bench_rows() -> list[Row]:
    """For docs/bench.md: the smallest network of each family that has rows, as created, as `bench models` has them."""
    rows = [row for row in read("networks_cpu") if row["form"] == "ours"]
    smallest: dict[str, str] = {}
    for name in sorted({row["op"] for row in rows}, key=lambda name: -find(name).params):
        smallest[find(name).family] = name
    found = []
    for row in rows:
        known = find(row["op"])
        if row["op"] == smallest[known.family]:
            facts = dict(params=known.params, macs=round(known.gmacs * 1e9), top1=known.top1)
            found.append(row | facts | dict(form="as created", mode="eager"))
    return found


def bench_models() -> str:
    rows = bench_rows()
    body = []
    for line in sorted(lines(rows), key=lambda line: -line["images_per_s"]):
        cells = [f"`{line['network']}`", f"{line['params'] / 1e6:.1f} M", f"{line['macs'] / 1e9:.2f}"]
        cells += [spread(line, key) for key in ("images_per_s", "latency_ms", "train_images_per_s")]
        body.append([*cells, "-" if line["top1"] is None else f"{line['top1']:.1f}"])
    head = ["network", "params", "GMACs", "images/s", "ms, one image", "train images/s", "top-1"]
    return f"Batch {rows[0]['batch']}. {method(rows)}\n\n{markdown(head, body)}"


def digest() -> str:
    """Identifies the data of docs/bench.png, which has it in its metadata."""
    return hashlib.sha256(json.dumps(lines(bench_rows()), sort_keys=True).encode()).hexdigest()


def draw_bench() -> None:
    """Draw docs/bench.png as `bench models --plot` does, in few colors; the data's digest goes into the metadata."""
    plot.draw(lines(bench_rows()), PLOT)
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("data", digest())
    picture = Image.open(PLOT).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(PLOT, optimize=True, pnginfo=metadata)


def operator(op: str) -> Callable[[], str]:
    """For docs/speed.md, one operator at 224 px: time of the gathered form divided by ours, and memory of both."""

    def made() -> str:
        rows = [row for row in read("operators_cpu") if row["op"] == op]
        other = OTHERS.get(op, "gather" if op in ("na2d", "routed") else "plain")
        body = []
        for size, forms in _by_shape(rows).items():
            mine, theirs = forms["ours"], forms[other]
            cells = [f"{theirs[w]['median_us'] / mine[w]['median_us']:.1f}x" for w in ("forward", "both")]
            memory = [f"{form['both']['peak_mib']:.0f}" for form in (mine, theirs)]
            body.append([size, *cells, " / ".join(memory)])
        head = ["map", "forward", "forward + backward", f"peak memory, ours / {other} (MiB)"]
        batch = ", ".join(sorted({str(row["batch"]) for row in rows}))
        return f"Batch {batch}. {method(rows)}\n\n{markdown(head, body)}"

    return made


def operators(name: str) -> Callable[[], str]:
    """All rows of a file of `bench ops`."""

    def made() -> str:
        rows = read(name)
        body = []
        for (op, size), forms in _by_op(rows).items():
            for form, ways in forms.items():
                cells = [op, size, form, str(next(iter(ways.values()))["batch"])]
                for way in ("forward", "both"):
                    row = ways.get(way, {})
                    if "median_us" not in row:
                        cells += [row.get("error", ""), "", ""]
                        continue
                    ratio = row["median_us"] / forms["ours"][way]["median_us"]
                    cells += [number(row["median_us"] / 1e3), _quartiles(row), f"{ratio:.2f}x"]
                memory = ways.get("both", {}).get("peak_mib")
                body.append([*cells, "" if memory is None else f"{memory:.0f}"])
        head = ["operator", "map", "form", "batch", "forward ms", "quartiles", "of ours", "both ms", "quartiles"]
        return f"{method(rows)}\n\n{markdown([*head, 'of ours', 'peak MiB'], body, 3)}"

    return made


def input_pipeline() -> str:
    rows = read("input_pipeline_cpu")
    head = ["224 px, one thread", "CPU ms an image", "images/s on 2 cores"]
    body = [[row["op"], f"{row['cpu_us'] / 1e3:.1f}", f"{2e6 / row['cpu_us']:.0f}"] for row in rows]
    return markdown(head, body)


def exports() -> str:
    """Which heights and widths a file takes, by network and format."""
    rows = json.loads(EXPORTS.read_text())
    formats = list(dict.fromkeys(to for cells in rows.values() for to in cells))
    body = [
        [f"`{name}`", *(_sides(cells[to]) if to in cells else "-" for to in formats)] for name, cells in rows.items()
    ]
    return markdown(["network", *(f"`{to}`" for to in formats)], body)


def int8() -> str:
    """What int8 costs on the digits, and how large the ONNX files are."""
    rows = json.loads(INT8.read_text())
    ways = list(next(iter(rows.values())))
    body = [
        [f"`{name}`", *(f"{cells[way]['top1']:.2f} % ({cells[way]['mb']:.1f} MB)" for way in ways)]
        for name, cells in rows.items()
    ]
    return markdown(["network", *(way if way == "float32" else f"`--int8 {way}`" for way in ways)], body)


def _sides(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not tried"
    if "refused" in cell:
        return "no"
    if cell["multiple"] == 0:
        return "one size"
    least, most = (max(side or 0 for side in sides) for sides in zip(cell["height"], cell["width"], strict=True))
    words = "any" if cell["multiple"] == 1 else f"multiples of {cell['multiple']}"
    return words + (f" from {least}" if least > 32 else "") + (f" to {most}" if most else "")


TABLES: dict[str, Callable[[], str]] = {
    "networks": networks,
    "compiled": compiled,
    "networks in full": networks_in_full,
    "bench models": bench_models,
    "na2d": operator("na2d"),
    "routed": operator("routed"),
    "operators": operators("operators_cpu"),
    "operators at 800x1344": operators("operators_800x1344_cpu"),
    "input pipeline": input_pipeline,
    "exports": exports,
    "int8": int8,
}


def text(file: Path) -> str:
    """A document with the tables that its data makes."""
    return MARKED.sub(lambda mark: f"{mark[1]}{TABLES[mark[2]]()}{mark[3]}", file.read_text())


def main() -> None:
    for file in FILES:
        file.write_text(text(file))
        print(file.relative_to(ROOT))
    if not PLOT.exists() or Image.open(PLOT).info.get("data") != digest():
        draw_bench()
        print(PLOT.relative_to(ROOT))


def _by_way(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        found.setdefault(row["op"], {}).setdefault(row["way"], {})[row["form"]] = row
    return found


def _by_op(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    found: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        found.setdefault((row["op"], shape(row)), {}).setdefault(row["form"], {})[row["way"]] = row
    return found


def _by_shape(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    return {size: forms for (_, size), forms in _by_op(rows).items()}


def _others(forms: Iterable[str]) -> list[str]:
    """What a network is compared with, once for both memory layouts; one empty word where there is nothing."""
    found = [_of(form) for form in forms if form not in ("ours", "fused") and not form.endswith(", compiled")]
    return list(dict.fromkeys(found)) or [""]


def _faster(forms: dict[str, Row], other_form: str) -> float | None:
    """Microseconds of the processors by the faster memory layout."""
    return min((row["cpu_us"] for form, row in forms.items() if _of(form) == other_form), default=None)


def _of(form: str) -> str:
    """A form without its memory layout."""
    return form.replace(", channels last", "")


def _quartiles(row: Row) -> str:
    return f"{number(row['q1_us'] / 1e3)}-{number(row['q3_us'] / 1e3)}" if "q1_us" in row else ""


if __name__ == "__main__":
    main()
