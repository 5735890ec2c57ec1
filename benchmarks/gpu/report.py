"""Tables and plots of what was measured, made on any machine from the rows alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row, ceilings, newest, read

Table = tuple[list[str], list[list[str]]]
OURS = ("ours", "auto")
SHOWN = ("Not measured", "Failures", "A training step of every family", "Tuning", "Profiles", "Networks", "Correctness")
SHOWN += ("Operators", "Ceilings")
WAYS = ("forward", "backward", "both")
OTHERS = ("auto", "gather", "torch", "sdpa, same mask and bias", "sdpa, same mask", "sdpa, all tokens", "flex")
OPERATORS = (
    "Microseconds, median, cold cache; backward is both less forward. Floor: the time for the bytes and products at "
    "the ceilings. Others: how many times as long as ours they take; `sdpa, all tokens` computes something else, "
    "attention without routes."
)
PROFILES = (
    "One step, by the profiler. A compiler's kernel that computes more than attention or a layer norm counts wholly."
)
# What is aimed at: shares of the floor at the first two stages, and times of other forms: (form, sides, times).
SHARES = {"na2d": {"forward": 0.5, "backward": 0.35}, "routed": {"forward": 0.5, "backward": 0.3}}
BESIDE: dict[str, list[tuple[str, tuple[int, ...], float]]] = {
    "na2d": [("flex", (56, 28), 3)],
    "routed": [("sdpa, all tokens", (14,), 1)],
}


def write(folder: Path) -> Path:
    """`report.md`, and plots beside it where matplotlib is installed."""
    rows = read(folder)
    out = folder / "report.md"
    out.write_text(text(rows, _plots(rows, folder)))
    return out


def text(rows: list[Row], pictures: Sequence[str] = ()) -> str:
    lines = ["# Measured by `python -m benchmarks.gpu`", ""]
    measured = [r for r in rows if "device" in r]
    machines = dict.fromkeys(f"{r['device']}, torch {r['torch']}, triton {r['triton']}" for r in measured)
    days = sorted({r["at"][:10] for r in measured if "at" in r})
    lines += [
        *(f"- {m}" for m in machines),
        *([f"- {' to '.join(dict.fromkeys((days[0], days[-1])))}"] if days else []),
    ]
    lines += [""]
    for title, note, table in sections(rows):
        if table[1]:
            lines += [f"## {title}", "", note, "", *markdown(table), ""]
    lines += [f"![{picture}]({picture})" for picture in pictures]
    return "\n".join(lines).rstrip() + "\n"


def sections(rows: list[Row]) -> Iterable[tuple[str, str, Table]]:
    latest = newest(rows)
    yield "Ceilings", "Floors are made of the highest.", rates(latest)
    yield "Correctness", "Largest error over what is allowed, by operator and dtype.", correctness(latest)
    yield "Operators", OPERATORS, operators(latest)
    yield "Operators, tuned", "Microseconds, median and quartiles, of ours.", tuned(latest)
    yield "Tuning", "What was best, and the pass's microseconds with it and with the default.", tuning(latest)
    yield "Networks", "Images a second; beside the plain form's of the same weights.", networks(latest)
    yield "Profiles", PROFILES, profiles(latest)
    yield "A training step of every family", "float32 weights, bfloat16 autocast.", training(latest)
    yield "Failures", "What failed, and what repeats it.", failures(latest)
    yield "Not measured", "Cut off by its box of time.", cuts(latest)


def floor_us(row: Row, rows: list[Row]) -> float | None:
    rates = ceilings([r for r in rows if r.get("device") == row["device"]])
    if "copy" not in rates or "bytes" not in row:
        return None
    return max(row["bytes"] / rates["copy"], row.get("flops", 0) / rates.get("matmul", float("inf"))) * 1e6


def rates(rows: list[Row]) -> Table:
    found = [r for r in rows if r["part"] == "ceilings" and "rate" in r]
    body = [[r["op"], r.get("by", ""), f"{r.get('bytes', 0) >> 20 or ''}", f"{r['rate'] / 1e12:.3g}"] for r in found]
    return ["", "by", "MiB", "10^12 a second"], body


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


def by_form(rows: list[Row]) -> dict[tuple[str, tuple[tuple[str, int], ...]], dict[str, dict[str, Row]]]:
    """Of every operator and shape the rows by form and way. The tuned rows are ours where there are any; the backward
    pass is both less forward, in time and in work."""
    found: dict[Any, Any] = {}
    for row in rows:
        if row["part"] not in ("operators", "flex", "tuned") or "form" not in row:
            continue
        forms = found.setdefault((row["op"], tuple(row["shape"].items())), {})
        ways = forms.setdefault(row["form"], {})
        if row["part"] == "tuned" or ways.get(row["way"], {}).get("part") != "tuned":
            ways[row["way"]] = row
    for forms in found.values():
        for ways in forms.values():
            if all("median_us" in ways.get(way, {}) for way in ("forward", "both")):
                less = {n: ways["both"][n] - ways["forward"][n] for n in ("median_us", "bytes", "flops")}
                ways["backward"] = ways["both"] | less
    return found


def operators(rows: list[Row]) -> Table:
    """A line for a shape and direction: ours, and how many times as long the other forms take."""
    body = []
    for (op, shape), forms in by_form(rows).items():
        name = f"{op} {', '.join(f'{k} {v}' for k, v in shape)}"
        for way in WAYS:
            times = {form: ways[way] for form, ways in forms.items() if "median_us" in ways.get(way, {})}
            if not times:
                continue
            mine = times.get("ours", {}).get("median_us")
            floor = floor_us(next(iter(times.values())), rows)
            cells = [f"{floor:.1f}" if floor else "", f"{mine:.1f}" if mine else ""]
            cells += [f"{floor / mine:.1%}" if floor and mine else "", verdict(op, dict(shape), way, times, floor)]
            for form in OTHERS:
                if form in times and mine:
                    cells.append(f"{times[form]['median_us'] / mine:.2f}x")
                elif form in times:
                    cells.append(f"{times[form]['median_us']:.0f} us")
                else:
                    cells.append("too large" if "reason" in forms.get(form, {}).get(way, {}) else "")
            body.append([name, way, *cells])
    return ["", "way", "floor us", "ours us", "of the floor", "target", *OTHERS], body


def verdict(op: str, shape: dict[str, int], way: str, times: dict[str, Row], floor: float | None) -> str:
    """What is aimed at, and whether it is met."""
    if "ours" not in times:
        return ""
    mine, found = times["ours"]["median_us"], []
    if floor and shape["side"] >= 28 and way in SHARES.get(op, {}):
        aim = SHARES[op][way]
        found.append((f"{aim:.0%}", floor / mine >= aim))
    for form, sides, aim in BESIDE.get(op, []):
        if form in times and shape["side"] in sides and way != "backward":
            found.append((f"{aim}x {form}", times[form]["median_us"] >= aim * mine))
    return "; ".join(f"{words}: {'met' if met else 'MISSED'}" for words, met in found)


def tuned(rows: list[Row]) -> Table:
    """Ours as shipped, and with the table that this run tuned."""
    body = []
    ours = [r for r in rows if r.get("form") == "ours" and r["part"] in ("operators", "tuned") and "median_us" in r]
    for op, shape, way in dict.fromkeys((r["op"], tuple(r["shape"].items()), r["way"]) for r in ours):
        same = [r for r in ours if (r["op"], tuple(r["shape"].items()), r["way"]) == (op, shape, way)]
        mine = {r["part"]: r for r in same}
        cells = [
            f"{mine[p]['median_us']:.1f} ({mine[p]['q1_us']:.1f} to {mine[p]['q3_us']:.1f})" if p in mine else ""
            for p in ("operators", "tuned")
        ]
        host = next((f"{r['host_us']:.0f}" for r in reversed(same) if "host_us" in r), "")
        body.append([f"{op} {', '.join(f'{k} {v}' for k, v in shape)}", way, *cells, host])
    return ["", "way", "as shipped", "tuned here", "Python us"], body


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
    profiled = {(r["op"], r["way"]): r for r in rows if "attention_share" in r and "compiled" not in r["mode"]}
    modes = list(dict.fromkeys(r["mode"] for r in found))
    speeds = {(r["op"], r["way"], r["mode"]): r["images_per_s"] for r in found}
    body = []
    for name, way in dict.fromkeys((r["op"], r["way"]) for r in found):
        cells = []
        for mode in modes:
            mine, plain = speeds.get((name, way, mode)), speeds.get((f"plain {name}", way, mode))
            cells.append(f"{mine:.0f}" + (f" ({mine / plain:.2f}x plain)" if plain else "") if mine else "")
        same = [r for r in found if (r["op"], r["way"]) == (name, way)]
        share = f"{profiled[name, way]['attention_share']:.0%}" if (name, way) in profiled else ""
        memory = next((str(r["peak_mib"]) for r in same if "peak_mib" in r), "")
        body.append([name, way, str(same[0]["batch"]), *cells, share, memory])
    return ["network", "way", "batch", *modes, "attention", "peak MiB"], body


def profiles(rows: list[Row]) -> Table:
    body = []
    for r in rows:
        if "kernels" in r:
            cells = [f"{r[n]:.0%}" if n in r else "" for n in ("attention_share", "norm_share")]
            mode = r["mode"].removesuffix("profiler").rstrip(", ") or "eager"
            body.append([r["op"], r["way"], mode, str(r["kernels"]), f"{r['kernel_us'] / 1e3:.1f}", *cells])
    return ["network", "way", "", "kernels", "ms", "attention", "layer norm"], body


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


def keep(folder: Path, results: Path, tuned: Path) -> list[Path]:
    """Put into the repository what is worth it of a run: rows without those of candidates, their report, the table.

    What was kept before and not measured again stays. Files written: `results/<GPU>/rows.jsonl` and `report.md`,
    `tuned/<GPU>.json`.
    """
    from hybridzoo.kernels.tuning import table_name

    rows = slim(newest(read(folder)))
    devices = {r["device"] for r in rows}
    if len(devices) != 1 or any(r.get("dry") for r in rows):
        raise SystemExit(f"{folder}: rows of one GPU are kept, not of {sorted(devices)}")
    table = table_name(devices.pop())
    target = results / table.removesuffix(".json")
    target.mkdir(parents=True, exist_ok=True)
    measured = {r["task"] for r in rows if not r.get("cut")}
    older = [r for r in read(target) if r["task"] not in measured and not r.get("cut")]
    rows = older + [r for r in rows if r["task"] in measured or r["task"] not in {o["task"] for o in older}]
    (target / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (target / "report.md").write_text(text(read(target)))
    made = [target / "rows.jsonl", target / "report.md"]
    if (folder / table).exists():
        tuned.mkdir(exist_ok=True)
        made.append(tuned / table)
        made[-1].write_text((folder / table).read_text())
    return made


def slim(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        if row["part"] == "compile" or row.get("done") or (row["part"] == "tuning" and "best" not in row):
            continue
        kept = {k: v for k, v in row.items() if k not in ("version", "python", "traceback", "ratios", "largest")}
        found.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in kept.items()})
    return found


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
