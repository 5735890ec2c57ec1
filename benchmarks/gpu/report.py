"""Tables and plots of what was measured, made on any machine from the rows alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.rows import Row, read

Table = tuple[list[str], list[list[str]]]
OURS = ("ours", "auto")
SHOWN = (
    "Not measured",
    "Failures",
    "A training step of every family",
    "Tuning",
    "Networks",
    "Correctness",
    "At a glance",
)
SHOWN += ("Ceilings",)


def write(folder: Path) -> Path:
    """`report.md`, and plots beside it where matplotlib is installed."""
    rows = read(folder)
    lines = [f"# Measured by `python -m benchmarks.gpu` ({len(rows)} rows)", ""]
    machines = dict.fromkeys(f"{r['device']}, torch {r['torch']}, triton {r['triton']}" for r in rows if "device" in r)
    lines += [*(f"- {m}" for m in machines), ""]
    for title, note, table in sections(rows):
        if table[1]:
            lines += [f"## {title}", "", note, "", *markdown(table), ""]
    if pictures := _plots(rows, folder):
        lines += [f"![{picture}]({picture})" for picture in pictures] + [""]
    out = folder / "report.md"
    out.write_text("\n".join(lines).rstrip() + "\n")
    return out


def sections(rows: list[Row]) -> Iterable[tuple[str, str, Table]]:
    latest = newest(rows)
    yield "Ceilings", "Floors are made of these.", ceilings(latest)
    yield "Correctness", "Largest error over what is allowed, by operator and dtype.", correctness(latest)
    note = "Microseconds, median; floor: the time for the bytes and products at the ceilings, and its share of ours."
    yield "Operators", note, operators(latest, ("operators", "flex"))
    yield "Operators, tuned", note, operators(latest, ("tuned",))
    yield "At a glance", "Microseconds; the floor is the least that the bytes and products take.", glance(latest)
    yield "Tuning", "What was best, and the pass's microseconds with it and with the default.", tuning(latest)
    yield "Networks", "Images a second.", networks(latest)
    yield "A training step of every family", "float32 weights, bfloat16 autocast.", training(latest)
    yield "Failures", "What failed, and what repeats it.", failures(latest)
    yield "Not measured", "Cut off by its box of time.", cuts(latest)


def newest(rows: list[Row]) -> list[Row]:
    """Of every task the rows of its last run that came to an end, else of its last run."""
    runs: dict[str, list[list[Row]]] = {}
    begun: dict[str, list[Row]] = {}
    for row in rows:
        name = row["task"]
        begun.setdefault(name, []).append(row)
        if row.get("done") or row.get("cut"):
            runs.setdefault(name, []).append(begun.pop(name))
    for name, rest in begun.items():
        runs.setdefault(name, []).append(rest)
    found: list[Row] = []
    for of_task in runs.values():
        whole = [run for run in of_task if run[-1].get("done")]
        found += (whole or of_task)[-1]
    return found


def floor_us(row: Row, rows: list[Row]) -> float | None:
    rates = {
        r["op"]: r["rate"] for r in rows if r["part"] == "ceilings" and "rate" in r and r["device"] == row["device"]
    }
    if "copy" not in rates or "bytes" not in row:
        return None
    return max(row["bytes"] / rates["copy"], row.get("flops", 0) / rates.get("matmul", float("inf"))) * 1e6


def ceilings(rows: list[Row]) -> Table:
    found = [r for r in rows if r["part"] == "ceilings" and "rate" in r]
    return ["", "device", "10^12 a second"], [[r["op"], r["device"], f"{r['rate'] / 1e12:.3g}"] for r in found]


def correctness(rows: list[Row]) -> Table:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["part"] == "correctness" and "worst" in row:
            groups.setdefault((row["op"], row["dtype"]), []).append(row)
    body = [
        [op, dtype, str(len(found)), str(sum("error" not in r for r in found)), f"{max(r['worst'] for r in found):.2f}"]
        for (op, dtype), found in groups.items()
    ]
    return ["operator", "dtype", "cases", "right", "worst"], body


def operators(rows: list[Row], parts: tuple[str, ...]) -> Table:
    found = [r for r in rows if r["part"] in parts and "median_us" in r]
    body = []
    for row in found:
        floor = floor_us(row, rows)
        group = [r for r in found if (r["op"], r["shape"], r["way"]) == (row["op"], row["shape"], row["way"])]
        mine = next((r["median_us"] for r in group if r["form"] in OURS), None)
        shape = ", ".join(f"{k} {v}" for k, v in row["shape"].items())
        spread = f"{row['median_us']:.1f} ({row['q1_us']:.1f} to {row['q3_us']:.1f})"
        share = f"{floor:.1f} ({floor / row['median_us']:.0%})" if floor else ""
        times = f"{row['median_us'] / mine:.2f}x" if mine else ""
        python = f"{row['host_us']:.0f}" if "host_us" in row else ""
        body.append([row["op"], shape, row["way"], row["form"], spread, share, times, python])
    return ["operator", "shape", "way", "form", "us (quartiles)", "floor (share)", "times ours", "Python us"], body


def glance(rows: list[Row]) -> Table:
    """One line for a shape and way, a column for a form."""
    found = [r for r in rows if r["part"] in ("operators", "flex", "tuned") and "median_us" in r]
    title = lambda r: "tuned" if r["part"] == "tuned" else r["form"]  # noqa: E731
    forms = list(dict.fromkeys(title(r) for r in found))
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        name = f"{row['op']} {', '.join(f'{k} {v}' for k, v in row['shape'].items())}"
        groups.setdefault((name, row["way"]), []).append(row)
    body = []
    for (name, way), group in groups.items():
        times = {title(r): r["median_us"] for r in group}
        floor = floor_us(group[0], rows)
        cells = [f"{floor:.0f}" if floor else "", *(f"{times[f]:.0f}" if f in times else "" for f in forms)]
        body.append([name, way, *cells])
    return ["", "way", "floor", *forms], body


def tuning(rows: list[Row]) -> Table:
    found = [r for r in rows if r["part"] == "tuning" and "best" in r]
    body = [
        [*map(str, r["key"]), str(r["best"]), f"{r['microseconds']:.1f}", f"{r['default']:.1f}",
         f"{r['default'] / r['microseconds']:.2f}x"]
        for r in found
    ]  # fmt: skip
    return ["operator", "kernel", "head_dim", "bytes", "shape", "best", "us", "default", "gain"], body


def networks(rows: list[Row]) -> Table:
    found = [r for r in rows if r["part"] in ("networks", "compiled") and "images_per_s" in r]
    profiled = {(r["op"], r["way"]): r for r in rows if "attention_share" in r}
    modes = list(dict.fromkeys(r["mode"] for r in found))
    body = []
    for name, way in dict.fromkeys((r["op"], r["way"]) for r in found):
        mine = {r["mode"]: r for r in found if (r["op"], r["way"]) == (name, way)}
        cells = [f"{mine[m]['images_per_s']:.0f}" if m in mine else "" for m in modes]
        first = next(iter(mine.values()))
        share = f"{profiled[name, way]['attention_share']:.0%}" if (name, way) in profiled else ""
        memory = next((str(r["peak_mib"]) for r in mine.values() if "peak_mib" in r), "")
        body.append([name, way, str(first["batch"]), *cells, share, memory])
    return ["network", "way", "batch", *modes, "attention", "peak MiB"], body


def training(rows: list[Row]) -> Table:
    found = [r for r in rows if r["part"] == "training" and "way" in r]
    body = [
        [r["op"], r["way"], r.get("error", "right")[:80], str(r.get("peak_mib", "")),
         "" if "difference" not in r else f"{r['difference']:.2g}"]
        for r in found
    ]  # fmt: skip
    return ["network", "check", "result", "peak MiB", "difference"], body


def failures(rows: list[Row]) -> Table:
    found = [r for r in rows if "error" in r]
    body = [
        [
            r["task"],
            " ".join(str(r[k]) for k in ("form", "way", "mode") if k in r),
            r["error"][:200],
            f"`{r['command']}`",
        ]
        for r in found
    ]
    return ["task", "", "error", "command"], [[cell.replace("|", "/").replace("\n", " ") for cell in r] for r in body]


def cuts(rows: list[Row]) -> Table:
    return ["task", "while"], [[r["task"], r["cut"]] for r in rows if r.get("cut")]


def markdown(table: Table) -> list[str]:
    head, body = table
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]


def summary(rows: list[Row]) -> str:
    """For the end of a terminal, within some ten thousand characters; what matters most comes last."""
    latest = newest(rows)
    texts = []
    for title in SHOWN:
        head, body = next(table for name, _, table in sections(latest) if name == title)
        if not body:
            continue
        if title == "Not measured":
            texts.append(f"== {title}: {len(body)}: " + "; ".join(cells[0] for cells in body[:12]))
            continue
        most = 12 if title == "Failures" else 40
        shown = [[cell[:60] for cell in cells] for cells in (head, *body[:most])]
        widths = [max(len(cells[i]) for cells in shown) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in shown]
        texts.append("\n".join([f"== {title} ({len(body)})", *lines]))
    return "\n".join(texts)


def _plots(rows: list[Row], folder: Path) -> list[str]:
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    latest, made = newest(rows), []
    floors = [r for r in latest if r["part"] in ("operators", "tuned") and r.get("form") in OURS and "median_us" in r]
    bars = [(r, floor) for r in floors if (floor := floor_us(r, latest))]
    if bars:
        names = [
            f"{r['op']} {' '.join(map(str, r['shape'].values()))} {r['form']} {r['way']} {r['part']}" for r, _ in bars
        ]
        figure, axis = plt.subplots(figsize=(8, 1 + 0.22 * len(bars)), layout="constrained")
        axis.barh(names, [100 * floor / r["median_us"] for r, floor in bars])
        axis.invert_yaxis()
        axis.set_xlabel("percent of the floor reached")
        figure.savefig(folder / "floors.png", dpi=110)
        plt.close(figure)
        made.append("floors.png")
    speeds = [r for r in latest if r["part"] in ("networks", "compiled") and "images_per_s" in r]
    if speeds:
        names = [f"{r['op']} {r['way']} {r['mode']}" for r in speeds]
        figure, axis = plt.subplots(figsize=(8, 1 + 0.2 * len(speeds)), layout="constrained")
        axis.barh(names, [r["images_per_s"] for r in speeds])
        axis.invert_yaxis()
        axis.set_xlabel("images a second")
        figure.savefig(folder / "networks.png", dpi=110)
        plt.close(figure)
        made.append("networks.png")
    return made
