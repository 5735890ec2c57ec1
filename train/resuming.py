"""The state from which a run resumes: a checkpoint, read safely, compared with the config, reduced to what is needed.

mmengine itself would evaluate the config text in the file, open files that the safe reader refuses with Python's
pickle, delete and write files named in it, and accept any numbers. Instead it gets `State.content`, which has only
numbers and tensors that fit the run.
"""

from __future__ import annotations

import collections
import copy
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import Tensor, nn

from hybridzoo.checkpoints.reading import strange
from hybridzoo.train import provenance, run_folder
from hybridzoo.train.data.holdout import Holdout, holdout_of
from hybridzoo.train.errors import UserError
from hybridzoo.train.nodes import dicts
from hybridzoo.train.plain import printable, shown
from hybridzoo.train.weights import read_checkpoint, unlike

MOST_CLASSES = 100_000  # a head with this many is built before the weights can be compared
LONGEST_NAME = 200  # characters of a class name
_OTHER = "use the config and data that it was trained with, or start a new run in another --work-dir"


@dataclass
class State:
    """A checkpoint to resume from.

    Attributes:
        path: the file.
        content: content of the file: `meta` with `epoch` and `iter`, `state_dict`, `optimizer`, `message_hub`, and
            `ema_state_dict` and `param_schedulers` if the run has them.
        seed: seed of the run.
        run: name of the run; empty for files of old versions.
        started: the run started from weights.
        holdout: how the run divides its training images.
        lineage: the weights that it started from, see `hybridzoo.train.provenance`.
    """

    path: Path
    content: dict[str, Any]
    seed: int
    run: str
    started: bool
    holdout: Holdout | None = None
    lineage: tuple[provenance.Start, ...] = ()

    def check(self, config: Config) -> None:
        """Compare with a configured run: its task, its classes, every tensor of its network.

        Raises:
            UserError: it belongs to another run; a tensor is not finite.
        """
        meta = self.content["meta"]
        if meta["task"] not in ("", config.task):
            raise self.unfit(f"is of {meta['task']}, the config is of {config.task}")
        compare_classes(self.path, meta["class_names"], class_names(config))
        most = config.train_cfg.get("max_iters")
        if most is not None and meta["iter"] > most:
            raise UserError(
                f"checkpoint {self.path}: has done {meta['iter']:,} iterations, the config asks for {most:,}"
            )
        own = skeleton(config).state_dict()
        for key in self.content.keys() & {"state_dict", "ema_state_dict"}:
            state = dict(self.content[key])
            if key == "ema_state_dict":
                steps = state.pop("steps", None)
                if steps is None or steps.numel() != 1 or steps.is_floating_point() or steps.is_complex():
                    raise self.unfit("ema_state_dict.steps is not a count")
                inside = "module."
                state = {k.removeprefix(inside) if k.startswith(inside) else f"?{k}": v for k, v in state.items()}
            if reasons := unlike(own, state):
                raise self.unfit(f"{key} does not fit {config.model.get('name') or config.model.type}: {reasons}")

    def check_built(self, optimizer: Any, schedulers: Any) -> None:
        """Compare with the optimizer (mmengine's wrapper) and the schedules that will continue.

        Raises:
            UserError: they have another type, belong to other parameters, or hold values that are not numbers.
        """
        found, own = self.content["optimizer"], optimizer.state_dict()
        parameters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        state, groups = found["state"], found["param_groups"]
        if len(groups) != len(own["param_groups"]):
            raise self.unfit(f"the optimizer has {len(groups)} groups, the config makes {len(own['param_groups'])}")
        kept = {**found, "param_groups": []}
        for i, (mine, theirs) in enumerate(zip(own["param_groups"], groups, strict=True)):
            where = f"optimizer.param_groups[{i}]"
            if not isinstance(theirs, dict) or not _numbers(theirs.get("params"), mine["params"]) or "lr" not in theirs:
                raise self.unfit(f"{where} has other parameters")
            kept["param_groups"].append(self._settings(mine, theirs, where))
        expected = _fresh_state(optimizer.optimizer, parameters)
        if expected and not state and self.content["meta"]["iter"]:
            raise self.unfit("optimizer.state is empty")
        for index, values in state.items():
            where = f"optimizer.state[{shown(index)}]"
            if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(values, dict):
                raise self.unfit(f"{where} belongs to no parameter")
            if expected and values and values.keys() != expected.keys():
                raise self.unfit(f"{where} holds {_list(values)}, the optimizer keeps {_list(expected)}")
            for key, value in values.items():
                place = f"{where}.{key if isinstance(key, str) else shown(key)}"
                like = expected.get(key)
                counts = isinstance(like, Tensor) and like.ndim == 0 and _is_number(value)  # steps of an older PyTorch
                if isinstance(like, Tensor) and not (isinstance(value, Tensor) or counts):
                    raise self.unfit(f"{place} is not a tensor")
                self._check_value(value, parameters[index], place)
        for key in found.keys() - {"state", "param_groups"}:
            if key not in own:  # the scaler of another precision
                del kept[key]
            else:
                check = self._settings if key == "base_param_settings" else self._like
                kept[key] = check(own[key], found[key], f"optimizer.{key if isinstance(key, str) else shown(key)}")
        self.content["optimizer"] = kept
        if schedulers is not None:
            theirs = self.content.get("param_schedulers")
            ours = [scheduler.state_dict() for scheduler in schedulers]
            self.content["param_schedulers"] = self._like(ours, theirs, "param_schedulers")

    def _check_value(self, value: Any, parameter: Tensor, where: str) -> None:
        if isinstance(value, Tensor):
            if kind := strange(value):
                raise self.unfit(f"{where} {kind}")
            if value.ndim and value.shape != parameter.shape:
                raise self.unfit(f"{where} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
            if not torch.isfinite(value).all():
                raise self.unfit(f"{where} is not finite")
        elif not (value is None or isinstance(value, bool) or _is_number(value)):
            raise self.unfit(f"{where} is not a number")

    def _settings(self, own: dict[str, Any], found: Any, where: str) -> dict[str, Any]:
        """An optimizer's settings; their keys differ between PyTorch's versions and schedules."""
        if not isinstance(found, dict):
            raise self.unfit(f"{where} has no settings")
        return {**own, **{key: self._like(own[key], found[key], f"{where}.{key}") for key in own if key in found}}

    def _like(self, own: Any, found: Any, where: str) -> Any:
        """`found`, converted to the types of `own`; both must have the same keys, lengths and types of values."""
        if isinstance(own, collections.Counter):
            if isinstance(found, dict) and all(type(n) is int for pair in found.items() for n in pair):
                return type(own)(found)
        elif isinstance(own, dict):
            if isinstance(found, dict) and own.keys() == found.keys():
                return {key: self._like(value, found[key], f"{where}.{key}") for key, value in own.items()}
            if isinstance(found, dict):
                raise self.unfit(f"{where} holds {_list(found)}, the config makes {_list(own)}")
        elif isinstance(own, list | tuple):
            if isinstance(found, list | tuple) and len(own) == len(found):
                return type(own)(
                    self._like(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(own, found, strict=True))
                )
            if isinstance(found, list | tuple):
                raise self.unfit(f"{where} has {len(found)} entries, the config makes {len(own)}")
        elif isinstance(own, Tensor):
            if isinstance(found, Tensor):
                self._check_value(found, own, where)
                return found
        elif own is None or isinstance(own, bool):
            if found is None or isinstance(found, bool):
                return found
        elif isinstance(own, int | float):
            if _is_number(found) or (type(found) is float and not math.isfinite(own) and not math.isnan(found)):
                return found
        elif found == own:
            return found
        raise self.unfit(f"{where} is {shown(found)}, which the config's {shown(own)} cannot become")

    def unfit(self, why: str) -> UserError:
        return UserError(f"checkpoint {self.path}: cannot be resumed: {why}; {_OTHER}")


def find(folder: Path) -> State | None:
    """The newest readable checkpoint of the folder's run; None if there is no checkpoint.

    Raises:
        UserError: the folder has files of a run, but none to resume from; or the newest is not a run's state.
    """
    problem = ""
    for path in run_folder.newest_first(folder):
        try:
            content = read_checkpoint(path)
        except UserError as error:
            problem = problem or str(error)
            print(printable(f"skipping {error}"))
            continue
        return _state(path, content)
    if problem:
        raise UserError(f"work_dir {folder}: none of its checkpoints can be resumed; the first: {problem}")
    run_folder.refuse_old_files(folder, resume=True)
    return None


def read(path: Path) -> State:
    """A checkpoint as a run's state.

    Raises:
        UserError: it cannot be read, or is not a run's state.
    """
    return _state(path, read_checkpoint(path))


def _state(path: Path, content: Mapping[str, Any]) -> State:
    parts: dict[str, dict[Any, Any]] = {}
    for key in ("meta", "state_dict", "optimizer", "message_hub"):
        if not isinstance(content.get(key), dict):
            what = "has no" if key not in content else "has another kind of"
            raise UserError(f"checkpoint {path}: cannot be resumed: {what} {key!r}; {_OTHER}")
        parts[key] = content[key]
    meta = parts["meta"]
    for key, limit in (("epoch", 1 << 53), ("iter", 1 << 53), ("seed", 1 << 32)):
        number = meta.get(key)
        if type(number) is not int or not 0 <= number < limit:
            raise UserError(f"checkpoint {path}: cannot be resumed: meta.{key} is {shown(number)}, no count")
    optimizer = parts["optimizer"]
    if not isinstance(optimizer.get("state"), dict) or not isinstance(optimizer.get("param_groups"), list):
        raise UserError(f"checkpoint {path}: cannot be resumed: 'optimizer' is no optimizer's state; {_OTHER}")
    task = meta.get("task") if isinstance(meta.get("task"), str) else ""
    kept: dict[str, Any] = {
        "meta": {"epoch": meta["epoch"], "iter": meta["iter"], "task": task, "class_names": names_in(path, meta)},
        "state_dict": parts["state_dict"],
        "optimizer": dict(optimizer),
        "message_hub": _message_hub(path, parts["message_hub"]),
    }
    if "ema_state_dict" in content:
        kept["ema_state_dict"] = content["ema_state_dict"]
    if "param_schedulers" in content:
        kept["param_schedulers"] = content["param_schedulers"]
    for key in ("state_dict", "ema_state_dict"):
        tensors = kept.get(key, {})
        if not isinstance(tensors, dict):
            raise UserError(f"checkpoint {path}: cannot be resumed: has another kind of {key!r}; {_OTHER}")
        for name, value in tensors.items():
            kind = strange(value) if isinstance(value, Tensor) else "is not a tensor"
            if not isinstance(name, str) or kind:
                what = f"{key}.{name}" if isinstance(name, str) else f"{key}: {shown(name)}"
                raise UserError(f"checkpoint {path}: cannot be resumed: {what} {kind or 'is no name'}; {_OTHER}")
    run = meta.get("run")
    started = meta.get("started") is True
    lineage = tuple(provenance.clean(meta.get(provenance.KEY)).get("start", ()))
    name = run if isinstance(run, str) else ""
    return State(path, kept, meta["seed"], name, started, holdout_in(path, meta), lineage)


def holdout_in(path: str | Path, meta: Any) -> Holdout | None:
    """How a run divided its training images, from its checkpoint's `meta`; None if it did not.

    Raises:
        UserError: the value is invalid.
    """
    options = meta.get("val_fraction") if isinstance(meta, dict) else None
    if options is not None and not isinstance(options, dict):
        raise UserError(f"checkpoint {path}: meta.val_fraction is {shown(options)}, which is not a fraction and a seed")
    try:
        return holdout_of(options)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error


def _message_hub(path: Path, hub: Mapping[str, Any]) -> dict[str, Any]:
    """The best score so far, and the files in the run's folder that newer or better ones replace."""
    info = hub.get("runtime_info", {})
    kept: dict[str, Any] = {"last_ckpt": str(path)}
    for key, value in info.items() if isinstance(info, dict) else ():
        wrong = False
        if key == "keep_ckpt_ids":
            wrong = not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value)
            kept[key] = value
        elif isinstance(key, str) and re.fullmatch(r"best_score\w*(/\w+)?", key):
            wrong = not _is_number(value)
            kept[key] = value
        elif isinstance(key, str) and re.fullmatch(r"best_ckpt\w*(/\w+)?", key):
            # The folder may have been moved; a run's best checkpoint is always in the run's own folder.
            wrong = not isinstance(value, str)
            name = "" if wrong else Path(value).name
            if re.fullmatch(r"best_[^/\\]+\.pth", name) and path.with_name(name).is_file():
                kept[key] = str(path.with_name(name))
        if wrong:
            raise UserError(f"checkpoint {path}: cannot be resumed: message_hub's {key} is {shown(value)}")
    return {"runtime_info": kept, "log_scalars": {}, "resumed_keys": dict.fromkeys(kept, True)}


# Classes --------------------------------------------------------------------------------------------------------------


def names_in(path: str | Path, meta: Any) -> tuple[str, ...]:
    """The class names in a checkpoint's `meta`, or an empty list.

    Raises:
        UserError: a name is not text, empty, very long, or repeated.
    """
    names = meta.get("class_names") if isinstance(meta, dict) else None
    if names is None:
        return ()
    if not isinstance(names, list | tuple) or len(names) > MOST_CLASSES:
        raise UserError(f"checkpoint {path}: its class names are not a list of at most {MOST_CLASSES:,} names")
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or name in seen:
            twice = isinstance(name, str) and name in seen
            why = "is repeated" if twice else f"is not a name (1 to {LONGEST_NAME} letters)"
            raise UserError(f"checkpoint {path}: the class name {shown(name)} {why}")
        seen.add(name)
    return tuple(names)


def class_names(config: Config) -> tuple[str, ...]:
    """The class names of a configured run's training data, in the order of their indices; empty if unknown."""
    for node in dicts((config.get("train_dataloader") or config.get("test_dataloader") or {}).get("dataset")):
        names = node.get("classes") or (node.get("metainfo") or {}).get("classes")
        if names is None and node.get("type"):
            with DATASETS.switch_scope_and_registry(config.get("default_scope", "mmengine")) as registry:
                kind = registry.get(node["type"]) if isinstance(node["type"], str) else node["type"]
            names = (getattr(kind, "METAINFO", None) or {}).get("classes")
        if names:
            return tuple(map(str, names))
    return ()


def compare_classes(path: str | Path, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Refuse weights for other classes: their class indices would have another meaning.

    Raises:
        UserError: both are known and differ; the message lists both.
    """
    if theirs and ours and tuple(theirs) != tuple(ours):
        raise UserError(
            f"checkpoint {path}: was trained on {len(theirs)} classes ({_list(theirs, 40)}), "
            f"the data has {len(ours)} ({_list(ours, 40)}); {_OTHER}"
        )


def skeleton(config: Config) -> nn.Module:
    """The config's model without values, to compare names and shapes."""
    model = copy.deepcopy(config.model)
    for node in dicts(model):
        for key in ("pretrained", "weights", "init_cfg"):
            if key in node:
                node[key] = False if key == "pretrained" and isinstance(node[key], bool) else None
    scope = DefaultScope.overwrite_default_scope(config.get("default_scope", "mmengine"))
    with scope, torch.device("meta"), torch.random.fork_rng(devices=[]):
        return MODELS.build(model)


def _fresh_state(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The state of an optimizer for a parameter after its first step, from a new optimizer of the same type."""
    if not parameters:
        return {}
    probe = nn.Parameter(torch.zeros(1, 1))
    probe.grad = torch.zeros(1, 1)
    known = inspect.signature(type(optimizer)).parameters
    fresh = type(optimizer)([probe], **{key: value for key, value in optimizer.defaults.items() if key in known})
    fresh.step()
    return dict(fresh.state[probe])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list(names: Any, most: int = 8) -> str:
    told = [name[:LONGEST_NAME] if isinstance(name, str) else shown(name) for name in list(names)[:most]]
    return ", ".join(told) + (f" and {len(names) - most} more" if len(names) > most else "") if told else "nothing"


def _numbers(found: Any, own: list[int]) -> bool:
    """Whether a file's list has exactly these integers, and no objects with their own comparison."""
    return isinstance(found, list) and all(type(number) is int for number in found) and found == own
