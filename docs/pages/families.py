"""A page per family of networks, made of the cards, the published recipes, measured speed and `families.yaml`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import yaml

from hybridzoo.checkpoints import Card, cards
from hybridzoo.checkpoints.markdown import series_table
from hybridzoo.train import names
from hybridzoo.train.bench import rows as results
from pages.pictures import PICTURES, chain
from pages.tables import link, score, size, table

ROOT = Path(__file__).parents[2]
SPEED = ROOT / "benchmarks" / "results"
OURS = {"ours": "", "as created": "", "fused": "fused"}  # forms of results -> how a table calls them


@functools.cache
def families() -> dict[str, dict[str, Any]]:
    """What `families.yaml` says, by the page's name, in the order of titles."""
    found = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text(encoding="utf-8"))
    return dict(sorted(found.items(), key=lambda item: item[1]["title"].lower()))


def pages() -> dict[str, str]:
    """Path below `docs` -> Markdown of every family, and of the overview."""
    return {"families/index.md": overview(), **{f"families/{name}.md": page(name) for name in families()}}


def overview() -> str:
    lines = []
    for name, family in families().items():
        known = _cards(family)
        models = dict.fromkeys(card.model for card in known)
        papers = ", ".join(f"[{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})" for paper in family["papers"])
        lines.append((f"[{family['title']}]({name}.md)", str(len(models)), papers, _first_sentence(family["summary"])))
    return (
        "# Families\n\n"
        f"{len({card.model for card in cards()})} models in {len(lines)} families. All of them are timm models: "
        "any image size from 32 x 32, training and inference, CPU and GPU.\n\n"
        + table(("family", "models", "papers", "in one sentence"), lines)
        + "## Sizes, accuracy and weights\n\n"
        "One line for each series of models; every published file is in [all models](../models.md).\n\n"
        + series_table()
        + "\nTop-1 is ImageNet-1k accuracy in percent, as the authors report it, or timm for its conversions. "
        "*Untested* means that the link could not be tried where this table was made.\n"
    )


def page(name: str) -> str:
    """One family's page."""
    family = families()[name]
    known = _cards(family)
    models = list(dict.fromkeys(card.model for card in known if card.task == "classification"))
    parts = [
        f"# {family['title']}\n",
        family["summary"],
        "## Use it\n",
        _use(models[0], known),
        "## The block\n",
        chain(family["block"]),
        "Coloured steps have a residual connection: their output is added to their input.\n",
        PICTURES[family["picture"]](),
        f"*{family['caption'].strip()}*\n",
        "## Models\n",
        _variants(known),
        "## Published weights\n",
        _weights(known),
        "**Licence.** " + family["licence"] + "\n",
        "## Speed\n",
        _speed(models),
        "## Published recipes\n",
        _recipes(models),
        "## What the published code cannot do, and what this package does\n",
        table(("the published code", "this package"), family["limits"]),
        "## Papers and citation\n",
        _citation(family),
    ]
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def _cards(family: dict[str, Any]) -> list[Card]:
    return [card for card in cards(task=None) if card.family in family["modules"]]


def _first_sentence(text: str) -> str:
    return text.strip().split(". ")[0].rstrip(".").replace("\n", " ") + "."


def _use(model: str, known: list[Card]) -> str:
    pretrained = ", pretrained=True" if any(card.model == model and card.url for card in known) else ""
    return (
        "```python\nimport timm, hybridzoo\n\n"
        f'model = timm.create_model("{model}"{pretrained}, num_classes=5)\n```\n\n'
        f"```sh\nhybridzoo train {model} --data photographs\n"
        f"hybridzoo train mask-rcnn --model {model} --data scenes\n```\n"
    )


def _variants(known: list[Card]) -> str:
    lines, seen = [], set()
    for card in known:
        if card.task == "classification" and card.model not in seen:
            seen.add(card.model)
            strides = sorted(set(card.strides))
            maps = f"{', '.join(map(str, _shortened(card.channels)))} at {', '.join(map(str, strides))}"
            figures = (f"{card.params / 1e6:.1f} M", f"{card.gmacs:.2f}", size(card))
            lines.append((f"`{card.model}`", *figures, score(card.top1), maps))
    head = ("model", "parameters", "GMACs", "input", "top-1", "channels at strides")
    return table(head, lines) + (
        "Parameters include the classifier of the first published file; GMACs are billions of multiply-accumulates at "
        "the given input. Top-1 is ImageNet-1k accuracy in percent, as published.\n"
    )


def _shortened(channels: tuple[int, ...]) -> tuple[int, ...]:
    """One width for a network whose maps are all alike."""
    return channels[:1] if len(set(channels)) == 1 else channels


def _weights(known: list[Card]) -> str:
    files = [card for card in known if card.url]
    if not files:
        notes = "\n".join(f"- {note}" for note in dict.fromkeys(card.notes for card in known if card.notes))
        return f"No weights were published.\n\n{notes}\n"
    classifiers = [card for card in files if card.task == "classification"]
    lines = [
        (
            f"`{card.name}`",
            size(card),
            f"{card.gmacs:.2f}",
            score(card.top1),
            link(card),
            "-" if card.parity is None else f"{card.parity:.0e}",
        )
        for card in classifiers
    ]
    text = table(("tag", "input", "GMACs", "top-1", "file", "parity error"), lines) + (
        "The parity error is the difference of our logits from the published network's, with the same weights, in "
        "float64 and relative to their standard deviation, where it was measured.\n\n"
        f"```sh\nhybridzoo checkpoints download {classifiers[0].name}\n```\n\n"
    )
    without = sorted({card.name for card in known if not card.url})
    if without:
        text += f"No weights were published of {', '.join(f'`{name}`' for name in without)}.\n\n"
    dense = [card for card in files if card.task != "classification"]
    if dense:
        lines = [(f"`{card.name}`", card.task, link(card)) for card in dense]
        text += "### Detectors and segmentors\n\n" + table(("tag", "task", "file"), lines)
    notes: dict[str, list[str]] = {}
    for card in files:
        if card.notes:
            notes.setdefault(card.notes, []).append(card.name)
    text += "### Notes on the files\n\n"
    for note, of in notes.items():
        named = ", ".join(f"`{name}`" for name in of[:3]) + (f" and {len(of) - 3} more" if len(of) > 3 else "")
        text += f"- {named}: {note}\n"
    licences = "; ".join(dict.fromkeys(card.licence for card in files if card.licence))
    return (
        text
        + f"\nLicence of the files, as stated: {licences}. Source of the scores: "
        + ("; ".join(dict.fromkeys(card.source for card in files if card.source)) + ".\n")
    )


def _speed(models: list[str]) -> str:
    text = _cpu_speed(models) + _recorded_speed(models)
    return text or "No speed of this family is recorded yet. Measure your own: `hybridzoo bench models`.\n"


def _cpu_speed(models: list[str]) -> str:
    rows = [row for row in results.read(SPEED / "networks_cpu.json") if row["op"] in models]
    if not rows:
        return ""
    rates: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in rows:
        key = (row["op"], "training" if row["way"] == "training" else "inference", row["batch"])
        rates.setdefault(key, {})[row["form"]] = f"{row['batch'] / row['median_us'] * 1e6:.1f}"
    forms = list(dict.fromkeys(row["form"] for row in rows))
    shown = {"ours": "as created", "fused": "after `fuse()`", "plain": "plain transcription"}
    lines = [
        (f"`{model}`", way, str(batch), *(of.get(form, "-") for form in forms))
        for (model, way, batch), of in rates.items()
    ]
    first = rows[0]
    return (
        f"Images a second on a CPU, {first['threads']} threads, 224 x 224, float32, PyTorch {first['torch']}:\n\n"
        + table(("model", "way", "batch", *(shown.get(form, form) for form in forms)), lines)
    )


def _recorded_speed(models: list[str]) -> str:
    """Rows of `hybridzoo bench` and of the GPU's script (docs/bench.md has the format), a table for each file."""
    text = ""
    for file in sorted(SPEED.glob("**/*.json*")):
        content = file.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in content.splitlines()] if file.suffix == ".jsonl" else json.loads(content)
        last: dict[tuple[str, ...], dict[str, Any]] = {}
        for row in rows:
            form = row.get("form") or "ours"
            if row.get("op") in models and row.get("images_per_s") and form in OURS:
                last[(row["op"], row["way"], OURS[form], row.get("mode", ""))] = row
        if not last:
            continue
        lines = [
            (f"`{model}`", way, ", ".join(filter(None, (form, mode))), str(row["batch"]), _rate(row["images_per_s"]))
            for (model, way, form, mode), row in last.items()
        ]
        row = next(iter(last.values()))
        threads = f", {row['threads']} threads" if row.get("threads") else ""
        where = f"{row['device']}{threads}, PyTorch {row['torch']}"
        text += f"Images a second on: {where}:\n\n"
        text += table(("model", "what", "how", "batch", "images/s"), lines)
    return text


def _rate(images: float) -> str:
    return f"{images:,.0f}" if images >= 100 else f"{images:.1f}"


def _recipes(models: list[str]) -> str:
    found = [recipe for recipe in names.recipes().values() if recipe.published and recipe.network in models]
    if not found:
        return "The authors published no recipe. The [everyday recipes](../recipes/everyday.md) train every model.\n"
    lines = [
        (f"`{recipe.name}`", recipe.task, recipe.score or "-", f"`{recipe.weights}`" if recipe.weights else "scratch")
        for recipe in found
    ]
    text = table(("recipe", "task", "published score", "starts from"), lines)
    notes: dict[str, list[str]] = {}
    for recipe in found:
        if recipe.note:
            notes.setdefault(recipe.note, []).append(recipe.name)
    for note, of in notes.items():
        text += f"- {f'`{of[0]}`' if len(of) == 1 else f'{len(of)} recipes, such as `{of[0]}`'}: {note}\n"
    text += f"\n```sh\nhybridzoo train {found[0].name} --data path/to/data\n```\n"
    return text


def _citation(family: dict[str, Any]) -> str:
    text = ""
    if family["code"]:
        text += f"Published code: [{family['code']}](https://github.com/{family['code']}).\n\n"
    for paper in family["papers"]:
        arxiv = f"https://arxiv.org/abs/{paper['arxiv']}"
        text += f"- {paper['title']}, {paper['venue']} {paper['year']}, [arXiv {paper['arxiv']}]({arxiv})\n"
    text += "\n```bibtex\n"
    for paper in family["papers"]:
        kind, where = ("article", "journal") if paper["venue"] == "arXiv" else ("inproceedings", "booktitle")
        text += (
            f"@{kind}{{{paper['key']},\n  title = {{{paper['title']}}},\n  author = {{{paper['author']}}},\n"
            f"  {where} = {{{paper['venue']}}},\n  year = {{{paper['year']}}},\n  eprint = {{{paper['arxiv']}}},\n"
            "  archivePrefix = {arXiv}\n}\n"
        )
    return text + "```\n"
