"""Checks a config before anything is built from it: unknown keys, text instead of numbers.

A dict with `type` holds the arguments of a class or function, whose signature gives the keys. Of the dicts without
`type`, those that mmengine's runner and the heads of mmdet and mmseg read are listed here; others may hold anything.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import mmengine.registry
from mmengine import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope, Registry
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop
from timm.data import Mixup, create_transform
from torch.utils.data import DataLoader

from hybridzoo.train import networks
from hybridzoo.train.errors import UserError
from hybridzoo.train.names import TASKS

# The keys that mmengine's runner reads; others belong to our engine, or are variables of the file.
RUNNER = set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"}

# Further keys of a dict with a type, which are removed before the call.
_BESIDE = {
    *("type", "_scope_", "_delete_", "init_cfg"),
    *("by_epoch", "convert_to_iter_based", "priority"),  # mmengine's runner
    *("accumulative_counts", "constructor", "optimizer", "paramwise_cfg"),  # of an optimizer wrapper
    *("bg_cls_weight", "requires_grad"),  # heads and norms of mmdet
    *("eval_mode", "force_grad_on_level", "in_index", "sampling"),  # of configs that mmdet and mmseg ship; no effect
}
# Dicts whose builders read more keys than the signature has.
_FREE = {"conv_cfg", "dcn", "init_cfg", "upsample_cfg"}

_ENVIRONMENT = {"cudnn_benchmark", "dist_cfg", "mp_cfg", "resource_limit"}
_PROCESSES = {"mkl_num_threads", "mp_start_method", "omp_num_threads", "opencv_num_threads"}
_LOADER = {"batch_sampler", "dataset", "disable_subprocess_warning", "num_batch_per_epoch"}
_CLIPPING = {"clip_value", "error_if_nonfinite", "foreach", "max_norm", "norm_type", "type"}
_NMS = {
    *("class_agnostic", "iou_threshold", "max_num", "method", "min_score", "offset", "score_threshold", "sigma"),
    *("split_thr", "type"),
}
# Keys that the heads of mmdet and mmseg read from `train_cfg` and `test_cfg`.
_HEADS = {
    *("allowed_border", "alpha", "assigner", "async_sleep_interval", "beta", "beta_topk", "bias", "carl"),
    *("center_ratio", "chunked_size", "conf_thr", "corner_topk", "crop_size", "debug", "distance_threshold"),
    *("dynamic_rcnn", "filter_low_score", "filter_thr", "ga_assigner", "ga_sampler", "ignore_ratio"),
    *("importance_sample_ratio", "init", "initial_assigner", "initial_beta", "initial_epoch", "initial_iou"),
    *("instance_on", "iou_thr", "iou_threshold", "iou_topk", "isr", "k", "kernel", "local_maximum_kernel"),
    *("mask_overlap", "mask_size", "mask_thr", "mask_thr_binary", "max_num_grid", "max_per_image"),
    *("max_per_img", "min_bbox_size", "mode", "neg_pos_ratio", "nms", "nms_across_levels", "nms_post"),
    *("nms_pre", "num_points", "object_mask_thr", "oversample_ratio", "panoptic", "panoptic_on", "perm_range"),
    *("pos_radius", "pos_weight", "rcnn", "refine", "reg_assigner", "rpn", "rpn_proposal", "sampler"),
    *("scale_factor", "score_thr", "score_voting", "semantic_on", "sigma", "size_divisor", "smoothl1_beta"),
    *("split_thr", "stride", "stuff_area_limit", "subdivision_num_points", "subdivision_steps", "top_k", "topk"),
    *("update_iter_interval", "with_nms"),
}
_HOOKS = ("checkpoint", "logger", "param_scheduler", "runtime_info", "sampler_seed", "timer")  # of mmengine's runner
_A_NUMBER = {"bool": "true or false", "float": "a number", "int": "a whole number"}
_A_SECTION = {dict: "a dict", list | tuple: "a list", dict | list | tuple: "a dict or a list of them"}
_SECTIONS: dict[str, Any] = {
    **dict.fromkeys(("model", "train_dataloader", "val_dataloader", "test_dataloader", "optim_wrapper"), dict),
    **dict.fromkeys(("train_cfg", "val_cfg", "test_cfg", "default_hooks", "randomness", "env_cfg"), dict),
    **dict.fromkeys(("param_scheduler", "val_evaluator", "test_evaluator"), dict | list | tuple),
    "custom_hooks": list | tuple,
}
_AROUND_A_TYPE = {"class", "typing", "Optional", "Union", "None", "NoneType"}  # text of annotations
_LEAST = {
    **dict.fromkeys(("accumulative_counts", "batch_size", "input_size", "max_epochs", "max_iters", "val_interval"), 1),
    "num_workers": 0,
}
_BELOW_ONE = {
    "drop_path_rate",
    "drop_rate",
    "label_smoothing",
    *(f"{part}_drop_rate" for part in ("attn", "pos", "proj")),
}
_SEEDS = 1 << 32
_REGISTRIES = [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]

ANY = "**"  # matches all other names
_OTHERS = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
Known = dict[str, list[inspect.Parameter]]  # key -> the parameters with this name in each signature


def check(config: Config, sections: Collection[str] = RUNNER) -> None:
    """Check every key at any depth. The packages of the config's task must be imported.

    Args:
        config: of a run.
        sections: the sections that will be used.

    Raises:
        UserError: names the first wrong key, its value and a correct one.
    """
    check_sections(config)
    with DefaultScope.overwrite_default_scope(config.get("default_scope", "mmengine")):
        for key, value, problem in problems(config.to_dict(), sections):
            raise UserError(f"config {key}={_short(value)}: {problem}")
    if not isinstance(config.get("compile", False), bool | dict):
        raise UserError(f"config compile={config.compile!r}: give true, false or a dict of torch.compile's arguments")
    for place, node in (
        ("model", config.get("model")),
        ("model.backbone", (config.get("model") or {}).get("backbone")),
    ):
        if isinstance(node, dict) and node.get("type") in ("ImageClassifier", "PyramidBackbone"):
            own = inspect.signature(MODELS.get(node["type"]).__init__).parameters
            networks.check(
                place, node["name"], {key: value for key, value in node.items() if key not in {"type", *own}}
            )


def check_sections(config: Config) -> None:
    """Check only the types of the sections, on which all code for configs relies.

    Raises:
        UserError: names the first section with text instead of a dict or list, or an unknown task.
    """
    if config.get("task") not in TASKS:
        raise UserError(f"config task={config.get('task')!r}: choose {', '.join(TASKS)}")
    for name, wanted in _SECTIONS.items():
        if not isinstance(config.get(name), wanted | None):
            raise UserError(f"config {name}={_short(config[name])}: give {_A_SECTION[wanted]}")


def problems(config: Mapping[str, Any], sections: Collection[str]) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, error) of every wrong key in some sections."""
    yield from _look({key: value for key, value in config.items() if key in sections}, ())


def _look(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any, str]]:
    if isinstance(node, list | tuple):
        for index, item in enumerate(node):
            yield from _look(item, (*path, str(index)))
    if not isinstance(node, dict):
        return
    known = _known(node, path)
    for key, value in node.items():
        inner = (*path, str(key))
        problem = None
        if known is not None:
            problem = _misspelt(str(key), node, known, path) or _misfit(known.get(str(key), []), value)
        problem = problem or _out_of_range(str(key), value)
        if problem:
            yield ".".join(inner), value, problem
        else:
            yield from _look(value, inner)


def _known(node: Mapping[str, Any], path: tuple[str, ...]) -> Known | None:
    """The keys of a dict that are read, or None if it may hold anything."""
    name = path[-1] if path else ""
    kind = node.get("type")
    if name in _FREE or not path:
        return None
    if path[0] == "model" and not kind and {"train_cfg", "test_cfg"} & set(path):
        return _joined(_HEADS)
    if name == "clip_grad":
        return _joined(_CLIPPING)
    if name == "nms" and isinstance(kind, str):
        return _joined(_NMS)
    if kind is None:
        return _typeless(path)
    found = [_parameters(target) for target in _targets(kind)]
    return _joined(_BESIDE, *found) if found else None


def _joined(*readers: set[str] | dict[str, inspect.Parameter]) -> Known:
    """The keys of several readers."""
    known: Known = {}
    for reader in readers:
        for key in reader:
            known.setdefault(key, []).extend([reader[key]] if isinstance(reader, dict) else [])
    return known


def _typeless(path: tuple[str, ...]) -> Known | None:
    """The keys of a dict that mmengine's runner or one of our classes reads."""
    reads: dict[tuple[str, ...], Any] = {
        ("train_cfg",): [EpochBasedTrainLoop, IterBasedTrainLoop, {"by_epoch", "type"}],
        ("val_cfg",): [ValLoop, {"type"}],
        ("test_cfg",): [TestLoop, {"type"}],
        ("optim_wrapper",): [OptimWrapper, {"type", "constructor", "optimizer", "paramwise_cfg"}],
        ("randomness",): [Runner.set_randomness],
        ("env_cfg",): [_ENVIRONMENT],
        ("env_cfg", "mp_cfg"): [_PROCESSES],
        ("auto_scale_lr",): [{"base_batch_size", "enable"}],
        ("model", "mixup"): [Mixup],
    }
    if path[0].endswith("_dataloader") and len(path) == 1:
        readers: Any = [DataLoader, _LOADER]
    elif path[0].endswith("_dataloader") and path[-1] == "transform":
        readers = [create_transform]
    elif path[0] == "default_hooks" and len(path) == 2:
        readers = [{"type"}]
    else:
        readers = reads.get(path)
    if readers is None:
        return None
    return _joined(*(reader if isinstance(reader, set) else _parameters(reader) for reader in readers))


def _misspelt(key: str, node: Mapping[str, Any], known: Known, path: tuple[str, ...]) -> str | None:
    if path[:1] == ("default_hooks",) and "type" not in node:
        return f"a hook needs a type; the default hooks are {', '.join(_HOOKS)}"
    earlier = list(node)[: list(node).index(key)]  # options come after the keys of the file
    twins = [other for other in earlier if difflib.SequenceMatcher(None, key, other).ratio() > 0.87]
    if ANY in known or (key in known and not (twins and known.keys() == _HEADS)):
        return None
    names = [name for name in known if known[name] or name not in _BESIDE]
    near = twins or difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(sorted(names)) or 'nothing'}"
    return f"nothing reads {key!r}; {hint}"


def _misfit(parameters: Sequence[inspect.Parameter], value: Any) -> str | None:
    """The error of text as the value of an argument that is a number for all its readers."""
    wanted = [_number(parameter) for parameter in parameters]
    if not isinstance(value, str) or not wanted or None in wanted:
        return None
    return f"give {_A_NUMBER[wanted[0] or 'int']}"


def _out_of_range(key: str, value: Any) -> str | None:
    """The error of a number under a key of that name."""
    if type(value) not in (int, float):
        return None
    if key in _LEAST and value < _LEAST[key]:
        return f"give at least {_LEAST[key]}"
    if key in _LEAST and type(value) is float and not value.is_integer():
        return "give a whole number"
    if key in _BELOW_ONE and not 0 <= value < 1:
        return "give a number from 0 to below 1"
    if key == "max_norm" and not value > 0:
        return "give a number above 0"
    if key == "seed" and not 0 <= value < _SEEDS:
        return f"give a whole number from 0 to {_SEEDS - 1}"
    if math.isnan(value) or (key == "lr" and math.isinf(value)):
        return "give a finite number"
    return None


def _number(parameter: inspect.Parameter) -> str | None:
    """The type of an argument that can only be a number."""
    words = set(re.findall(r"\w+", str(parameter.annotation))) - _AROUND_A_TYPE
    default = next((kind.__name__ for kind in (bool, int, float) if type(parameter.default) is kind), None)
    if words and words <= _A_NUMBER.keys():
        return default or sorted(words)[0]
    return default if not words & {"str", "Any"} else None


def _targets(kind: Any) -> list[Callable[..., Any]]:
    """The classes that a config's `type` may mean: a name may be registered as a module and as a transform."""
    if callable(kind):
        return [kind]
    name = str(kind).rpartition(".")[2]
    places = (place for registry in _REGISTRIES for place in (registry, *registry.children.values()))
    return [place.module_dict[name] for place in places if name in place.module_dict]


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a class or function by name; `ANY` is included if it takes others too."""
    if not inspect.isclass(target):
        return _named(target)
    found: dict[str, inspect.Parameter] = {}
    closed, one_parent = False, True  # a class with several bases may call all of them
    for parent in target.__mro__:
        if "__init__" in vars(parent) and parent is not object:
            own = _named(vars(parent)["__init__"])
            others = own.pop(ANY, None)
            found = {**own, **found}
            if others is not None and others.name != "kwargs":  # kwargs usually go to the parent
                return {**found, ANY: others}
            # Further arguments of mmengine's checkpoint hook go to functions that ours does not call.
            closed = closed or others is None or parent.__name__ == "CheckpointHook"
            if closed and one_parent:
                break
        one_parent = one_parent and len(parent.__bases__) == 1
    return found if closed else {**found, ANY: _OTHERS}


def _named(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a function by name; one that takes all others is named `ANY`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function in C
        return {ANY: _OTHERS}
    return {ANY if p.kind is p.VAR_KEYWORD else p.name: p for p in parameters if p.name != "self"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
