"""Applies `--cfg-options key.subkey=value` to a config. Every option must change something in the run."""

from __future__ import annotations

import ast
import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine import Config, ConfigDict

from hybridzoo.train import config_check
from hybridzoo.train.errors import UserError
from hybridzoo.train.names import TASKS

# Top-level keys that mmengine (besides its runner's sections) or our engine reads; all others are variables.
READ = {
    *("activation_checkpointing", "amp_dtype", "class_names", "compile", "custom_imports", "data_root", "device"),
    *(
        "digits",
        "efficient_conv_bn_eval",
        "find_unused_parameters",
        "fsdp",
        "model_wrapper_cfg",
        "on_bad",
        "settle",
        "start",
    ),
    *("sync_bn", "task", "val_fraction", "white_value", *config_check.RUNNER),
}
SHORT = {
    "train_cfg.max_epochs": "--epochs",
    "train_dataloader.batch_size": "--batch-size",
    "train_dataloader.num_workers": "--workers",
    "optim_wrapper.optimizer.lr": "--lr",
    "train_dataloader.dataset.transform.input_size": "--img-size",
    "model.frozen_stages": "--freeze",
    "model.backbone.frozen_stages": "--freeze",
    "randomness.seed": "--seed",
    "launcher": "--launcher",
}
_WORDS = {option.strip("-").replace("-", "_"): option for option in SHORT.values()}
# Keys that we extend, rewrite or remove before a run.
_TAKEN = {"custom_imports", "load_from", "resume", "start", "val_fraction"}
_ABSENT = object()


def put(config: Config, options: Sequence[str]) -> set[str]:
    """Apply options to a config, in place; the config remembers their keys.

    Args:
        options: ``key.subkey=value`` strings; a value is a Python literal, a bare word or a comma-separated list.

    Returns:
        The dotted keys of all values that were set.

    Raises:
        UserError: a malformed option, or one that nothing reads.
    """
    keys = []
    for option in options:
        key, value = _parse(option, config)
        _assign(config, key, value, option)
        keys.append(key)
    config.pop("options", None)  # left in a config that was saved and read again
    if keys:
        config.options = list(dict.fromkeys(keys))
    return {path for key in keys for path in _paths(_at(config, key), key)}


def values(config: Config) -> dict[str, Any]:
    """Key -> current value of the options that were applied to a config; removed ones are left out."""
    found = {key: _at(config, key) for key in config.get("options") or ()}
    return {key: copy.deepcopy(value) for key, value in found.items() if value is not _ABSENT}


def check_kept(config: Config, before: Mapping[str, Any]) -> None:
    """Check that a config still has the options' values.

    Args:
        config: the config of the run.
        before: the options' `values`.

    Raises:
        UserError: a value that follows from the network, the data or the machine has replaced an option.
    """
    for key, value in before.items():
        found = _at(config, key)
        if key.split(".")[0] not in _TAKEN and not _holds(value, found):
            instead = "nothing" if found is _ABSENT else _short(found)
            hint = f"use {SHORT[key]}" if key == "launcher" else "leave it out"
            raise UserError(
                f"option '{key}={_short(value)}': would change nothing: the run has {instead} there, which another "
                f"option, the network, the data or the machine sets; {hint}"
            )


def _parse(option: str, config: Config) -> tuple[str, Any]:
    key, equals, text = option.partition("=")
    key = key.strip()
    if not equals or not key or not all(part.strip() for part in key.split(".")):
        raise UserError(f"option {option!r}: expected key=value, e.g. train_cfg.max_epochs=10")
    top = key.split(".")[0]
    model = config.get("model")
    own = isinstance(model, dict) and model.get("data_preprocessor")  # the runner's key is for models without one
    if top not in READ or (top == "data_preprocessor" and own):
        raise UserError(f"option {option!r}: {_instead(top, config)}")
    value = parse_value(text.strip(), option)
    if key == "task" and value in TASKS and value != config.get("task"):
        raise UserError(
            f"option {option!r}: this recipe's task is {config.get('task')}; type: hybridzoo list --recipes"
        )
    return key, value


def _instead(name: str, config: Config) -> str:
    """The error of a top-level key that nothing reads, and the key to set instead."""
    sections = {key: value for key, value in config.items() if key in READ and key != name}
    value = config.get(name)
    places = [path for path, _ in _everything(sections) if path.rpartition(".")[2] == name]
    split, underscore, last = name.rpartition("_")
    if not places and underscore and f"{split}_dataloader" in sections:  # train_pipeline and similar variables
        places = [path for path, _ in _everything(sections) if path == f"{split}_dataloader.dataset.{last}"]
    if not places and isinstance(value, str | dict | list | tuple) and value:
        places = [path for path, found in _everything(sections) if type(found) is type(value) and found == value]
    if name in config:
        said = f"{name} is only a variable of the config, which nothing in a run reads"
        ask = "set {} instead"
    else:
        said, ask = f"the config has no {name!r}", "did you mean {}?"
        near = difflib.get_close_matches(name, READ | set(_WORDS), n=3, cutoff=0.6)
        places = places or [_WORDS.get(word, word) for word in near]
    if not places:
        return said
    shown = [f"{place} ({SHORT[place]})" if place in SHORT else place for place in places[:3]]
    return f"{said}; {ask.format(' or '.join(dict.fromkeys(shown)))}"


def _everything(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dicts and lists."""
    items: Any = ()
    if isinstance(node, dict | Config):
        items = node.items()
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    for key, value in items:
        path = f"{place}.{key}" if place else str(key)
        yield path, value
        yield from _everything(value, path)


def _paths(value: Any, key: str) -> Iterator[str]:
    yield key
    yield from (path for path, _ in _everything(value, key))


def _at(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        if isinstance(node, list | tuple):
            if not part.isdigit() or int(part) >= len(node):
                return _ABSENT
            node = node[int(part)]
        elif isinstance(node, dict | Config) and part in node:
            node = node[part]
        else:
            return _ABSENT
    return node


def _holds(wanted: Any, found: Any) -> bool:
    """Whether a value is unchanged; a dict may have more keys."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(key in found and _holds(value, found[key]) for key, value in wanted.items())
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        return len(wanted) == len(found) and all(map(_holds, wanted, found))
    return bool(wanted == found)


def _assign(config: Config, key: str, value: Any, option: str) -> None:
    """Set ``key`` to ``value``; a dict replaces the old value, unlike in a config file."""
    path = key.split(".")
    node: Any = config
    for depth, part in enumerate(path):
        if isinstance(node, list | tuple):
            if not part.isdigit() or int(part) >= len(node):
                place = ".".join(path[:depth])
                raise UserError(f"option {option!r}: {place} has the elements 0 to {len(node) - 1}, not {part}")
        elif not isinstance(node, dict | Config):
            raise UserError(f"option {option!r}: {'.'.join(path[:depth])} is {node!r}, nothing can be set inside it")
        slot: Any = int(part) if isinstance(node, list | tuple) else part
        if depth == len(path) - 1:
            node[slot] = value
            return
        if isinstance(node, dict | Config) and node.get(slot) is None:
            node[slot] = ConfigDict()
        elif isinstance(node[slot], tuple):
            node[slot] = list(node[slot])
        node = node[slot]


def parse_value(text: str, option: str) -> Any:
    """Parse an option's value: a Python literal, a bare word or a comma-separated list."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text[:1] in "[({" and text:
            raise UserError(f"option {option!r}: {text!r} is not a Python literal (quote the words inside)") from None
        return [parse_value(part.strip(), option) for part in text.split(",")] if "," in text else text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
