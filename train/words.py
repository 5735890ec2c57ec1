"""What the words after `test` and `predict` mean: RUN_OR_FILE, or CONFIG and CHECKPOINT, and then pictures.

Nothing here imports torch or mmengine, so that a wrong word is an immediate error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybridzoo.train import names
from hybridzoo.train.errors import UserError
from hybridzoo.train.hub.folder import is_hub_name


def split(words: Sequence[str], config: str | None, verb: str) -> tuple[str | None, Path, list[Path]]:
    """Which config, which run or checkpoint, and what follows.

    If the first word names a recipe, a network or a `.py` file, it is the config, and the next one the checkpoint. Any
    other word, and every word with `--config`, is the run's folder or the checkpoint, which contains its config.

    Args:
        words: after the verb, without options.
        config: value of `--config`.
        verb: for messages.

    Returns:
        Config or None, the folder or file, and the words after it.

    Raises:
        UserError: a word is missing, the first one is ambiguous, or the path does not exist.
    """
    rest = list(words)
    first = rest[0]
    if config is None and _is_config(first):
        if Path(first).exists() and not first.endswith(".py"):
            raise UserError(
                f"{first} is a config's name, and a file or folder here; type ./{first}, or --config {first}"
            )
        config, rest = rest.pop(0), rest
        if not rest:
            near = Path("work_dirs", first)
            hint = f"hybridzoo {verb} {near}" if near.is_dir() else f"hybridzoo {verb} RUN_OR_FILE"
            raise UserError(f"{first} is a config; name what was trained with it: {hint}")
    place = Path(rest.pop(0)).expanduser()
    if not place.exists() and not is_hub_name(place):
        known = [] if config or len(place.parts) > 1 else [*names.list_configs(), *names.our_models()]
        otherwise = "" if config or place.suffix else "nor a config of that name"
        hint = names.suggest(str(place), [*_neighbours(place), *known], otherwise)
        raise UserError(f"{place}: no such file or run folder{hint and '; '}{hint}")
    return config, place, [Path(word).expanduser() for word in rest]


def _is_config(word: str) -> bool:
    return word.endswith(".py") or word in names.list_configs() or names.is_model(word)


def _neighbours(place: Path) -> list[str]:
    """Files and folders that may have been meant: those next to `place`, and the runs in `work_dirs`."""
    folders = {place.parent, Path("work_dirs")}
    return sorted(str(path) for folder in folders if folder.is_dir() for path in folder.iterdir())
