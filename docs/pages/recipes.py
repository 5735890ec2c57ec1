"""Pages of the recipes: those for your own data and the published runs, as `hybridzoo list --recipes` knows them."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict

from hybridzoo.train import names
from pages.families import families
from pages.tables import table


def pages() -> dict[str, str]:
    """Path below `docs` -> Markdown."""
    return {"recipes/everyday.md": everyday(), "recipes/published.md": published()}


def everyday() -> str:
    """The recipes for data of one's own, with the words of their files."""
    text = (
        "# Everyday recipes\n\n"
        "A recipe is a way to train. Any network trains with any recipe: "
        "`hybridzoo train RECIPE --model NAME --data DIR`. What the network needs (widths, strides, input size) comes "
        "from the network; classes come from the data; batch size and length come from the number of images and the "
        "machine. The tables show what you can change in one word.\n\n"
    )
    found = [recipe for recipe in names.recipes().values() if not recipe.published]
    own, demos = [r for r in found if r.name in names.EVERYDAY], [r for r in found if r.name not in names.EVERYDAY]
    for task in names.TASKS:
        text += f"## {task.capitalize()}\n\n"
        for recipe in (r for r in own if r.task == task):
            text += f"### `{recipe.name}`\n\n{_words(recipe)}\n"
    text += "## Short options\n\n" + table(
        ("option", "changes"),
        [
            ("`--epochs N`", "length of the training"),
            ("`--batch-size N`", "images in a step, of all processes together"),
            ("`--lr X`", "learning rate"),
            ("`--img-size N`", "side of the training images in pixels"),
            ("`--freeze N`", "the first N stages are not trained"),
            ("`--weights W`", "weights to start from: published ones, a file, a run, `hf-hub:USER/NAME`, or `none`"),
            ("`--seed N`, `--device D`, `--workers N`", "randomness, machine, loader"),
            ("`--cfg-options KEY=VALUE ...`", "everything else in the config"),
        ],
    )
    lines = [(f"`{recipe.name}`", recipe.task) for recipe in demos]
    return text + "## Demos on the embedded digits\n\n" + table(("recipe", "task"), lines)


def published() -> str:
    """All published runs, family by family."""
    runs = [recipe for recipe in names.recipes().values() if recipe.published]
    text = (
        "# Published recipes\n\n"
        f"{len(runs)} runs as the authors report them. `hybridzoo train NAME --data DIR` trains one again; "
        "`hybridzoo list --recipes` shows the same table in a terminal. Scores are the authors': these runs "
        "were not trained again with this package. Top-1 and mIoU are in percent, AP from 0 to 100.\n\n"
    )
    by_file = defaultdict(list)
    for recipe in runs:
        by_file[_family(recipe.network)].append(recipe)
    for title, found in sorted(by_file.items(), key=lambda item: item[0].lower()):
        text += f"## {title}\n\n" + table(
            ("recipe", "task", "score", "starts from", "time"),
            [
                (
                    f"`{recipe.name}`",
                    recipe.task,
                    recipe.score or "-",
                    f"`{recipe.weights}`" if recipe.weights else "scratch",
                    recipe.time or "-",
                )
                for recipe in found
            ],
        )
    return text


def _family(network: str) -> str:
    """The title of a network's page; timm's own networks have none."""
    from hybridzoo.checkpoints import cards

    modules = {card.family for card in cards() if card.model == network}
    for family in families().values():
        if modules & set(family["modules"]):
            return family["title"]
    return f"{network.partition('_')[0]} (timm's own)"


def _words(recipe: names.Recipe) -> str:
    """The recipe file's docstring; the paragraph that is a command becomes a block."""
    words = inspect.cleandoc(ast.get_docstring(ast.parse(recipe.path.read_text(encoding="utf-8"))) or "")
    paragraphs = words.split("\n\n")
    return "\n".join(f"```sh\n{p}\n```\n" if p.startswith("hybridzoo ") else f"{p}\n" for p in paragraphs)
