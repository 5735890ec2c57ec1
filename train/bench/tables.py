"""Rows as tables: for a terminal, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from rich.table import Table

from hybridzoo.train import tables
from hybridzoo.train.bench.rows import Row

WAYS = ("inference", "latency", "training")


def by_network(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Name -> way -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["op"], {})[row["way"]] = row
    return found


def lines(rows: Sequence[Row]) -> list[Row]:
    """One line for each network: the numbers that `bench models` shows; images/s, ms and MiB."""
    found = []
    for name, ways in by_network(rows).items():
        first = next(iter(ways.values()))
        line: Row = dict(network=name, form=first["form"], mode=first["mode"], device=first["device"])
        line |= dict(dtype=first["dtype"], batch=ways.get("inference", first)["batch"])
        line |= {side: first.get("shape", {}).get(side) for side in ("height", "width")}
        line |= {key: first.get(key) for key in ("params", "macs", "top1")}
        for way in WAYS:
            row = ways.get(way, {})
            if way == "latency":
                for end, key in (("", "median_us"), ("_q1", "q1_us"), ("_q3", "q3_us")):
                    line[f"latency_ms{end}"] = _thousandth(row.get(key))
                continue
            prefix = "train_" if way == "training" else ""
            for end, key in (("", "median_us"), ("_q1", "q3_us"), ("_q3", "q1_us")):
                line[f"{prefix}images_per_s{end}"] = _rate(row.get(key), row.get("batch"))
            line[f"{prefix}memory_mib"] = row.get("peak_mib") if "error" not in row else None
        line["error"] = next((row["error"] for row in ways.values() if "error" in row), None)
        found.append(line)
    return found


def models(rows: Sequence[Row]) -> Table:
    """One line for each network: medians with quartiles in brackets; a dash if nothing was measured or published."""
    found = lines(rows)
    train, failed = any(row["way"] == "training" for row in rows), any(line["error"] for line in found)
    titles = ["network!", "px>", "params>", "GMACs>", "images/s>", "ms, one image>", "MiB>"]
    titles += ["train images/s>", "train MiB>"] * train + ["top-1>"] + ["failed"] * failed
    table = tables.new_table(*titles)
    for line in found:
        square = line["height"] == line["width"]
        cells = [line["network"], _dash(line["height"], "d") if square else f"{line['height']}x{line['width']}"]
        cells += [tables.millions(line["params"]) if line["params"] else "-"]
        cells += [_dash(line["macs"] and line["macs"] / 1e9, ".2f"), spread(line, "images_per_s")]
        cells += [spread(line, "latency_ms"), _dash(line["memory_mib"], ".0f")]
        if train:
            cells += [spread(line, "train_images_per_s"), _dash(line["train_memory_mib"], ".0f")]
        cells += [_dash(line["top1"], ".1f")] + [line["error"] or ""] * failed
        table.add_row(*cells)
    return table


def operator_lines(rows: Sequence[Row]) -> list[Row]:
    """One line for each shape and form: the numbers that `bench ops` shows; ms, MiB, and time divided by ours."""
    groups: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        forms = groups.setdefault((row["op"], shape(row)), {})
        forms.setdefault(row["form"], {})[row["way"]] = row
    found = []
    for (op, size), forms in groups.items():
        for form, ways in forms.items():
            first = next(iter(ways.values()))
            line: Row = dict(op=op, shape=size, form=form)
            line |= {key: first.get(key) for key in ("batch", "dtype", "device")}
            for way in ("forward", "both"):
                row, ours = ways.get(way, {}), forms.get("ours", {}).get(way, {})
                for end, key in (("", "median_us"), ("_q1", "q1_us"), ("_q3", "q3_us")):
                    line[f"{way}_ms{end}"] = _thousandth(row.get(key))
                both = "median_us" in row and "median_us" in ours
                line[f"{way}_of_ours"] = round(row["median_us"] / ours["median_us"], 3) if both else None
            line["memory_mib"] = ways.get("both", {}).get("peak_mib")
            line["error"] = next((row["error"] for row in ways.values() if "error" in row), None)
            found.append(line)
    return found


def shape(row: Row) -> str:
    """A row's shape in words: "56x56, 2 heads, dilation 8"."""
    given = row.get("shape", {})
    words = [f"{given['height']}x{given['width']}"] if "height" in given else []
    counted = ("heads", "regions", "channels")
    for key, value in given.items():
        if key not in ("height", "width"):
            words.append(f"{value} {key}" if key in counted else f"{key} {value}")
    return ", ".join(words)


def operators(rows: Sequence[Row]) -> Table:
    """One line for each shape and form: medians with quartiles, and time divided by ours."""
    found = operator_lines(rows)
    failed = any(line["error"] for line in found)
    titles = ["op", "shape!", "form", "forward ms>", "x ours>", "both ms>", "x ours>", "MiB>"] + ["failed"] * failed
    table = tables.new_table(*titles)
    for line in found:
        cells = [line["op"], line["shape"], line["form"]]
        for way in ("forward", "both"):
            cells += [spread(line, f"{way}_ms"), _dash(line[f"{way}_of_ours"], ".2f")]
        table.add_row(*cells, _dash(line["memory_mib"], ".0f"), *[line["error"] or ""] * failed)
    return table


def spread(line: Row, key: str) -> str:
    """ "310 (305-318)": median and quartiles."""
    if line[key] is None:
        return "-"
    return f"{number(line[key])} ({number(line[f'{key}_q1'])}-{number(line[f'{key}_q3'])})"


def number(value: float) -> str:
    """Three significant digits: 1234.5 -> "1234", 31.42 -> "31.4", 0.01234 -> "0.0123"."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_csv(found: Sequence[Row]) -> str:
    """Lines with the same keys as CSV, with a header; unknown values are empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for line in found for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in line.items()} for line in found)
    return file.getvalue()


def markdown(head: Sequence[str], body: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table; the first `text` columns hold words, the others numbers, aligned to the right."""
    lines = [head, ["---"] * text + ["---:"] * (len(head) - text), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _thousandth(value: float | None) -> float | None:
    return None if value is None else round(value / 1e3, 4)


def _rate(microseconds: float | None, batch: int | None) -> float | None:
    return None if microseconds is None or batch is None else round(batch / microseconds * 1e6, 3)
