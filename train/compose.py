"""Combines a recipe and a network: puts what is read from the network (see `facts`) into the recipe's config.

A recipe has `settle = dict(network=True)`: widths, strides, input size, normalisation and layer decay then come from
the network, whatever the recipe has for its default one. The composed config does not have this key any more, and all
its values are final.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from typing import Any

import timm
from mmengine import Config

from hybridzoo.train.errors import UserError
from hybridzoo.train.facts import Network, read_network, takes
from hybridzoo.train.networks import check_name


def set_network(config: Config, name: str) -> None:
    """Set the network in a config of any task, in place; arguments of the previous network are removed."""
    check_name(name)
    holder = network_of(config)
    if holder.get("name") == name:
        return
    kept = {*_own_arguments(config), "drop_path_rate"}
    for key in [key for key in holder if key not in kept]:
        del holder[key]
    holder["name"] = name


def network_of(config: Config) -> Any:
    """The dict that has the network's name: the backbone's or the classifier's."""
    return config.model.backbone if "backbone" in config.model else config.model


def network_arguments(config: Config) -> dict[str, Any]:
    """The arguments for `timm.create_model` in a config."""
    own = _own_arguments(config)
    return {key: value for key, value in network_of(config).items() if key not in own}


def _own_arguments(config: Config) -> set[str]:
    """Names of arguments of the classifier or backbone class, not of the network inside it."""
    if "backbone" in config.model:
        from hybridzoo.train.backbone import PyramidBackbone

        build: Any = PyramidBackbone.__init__
    else:
        from hybridzoo.train.classification import ImageClassifier

        build = ImageClassifier.__init__
    named = inspect.signature(build).parameters.values()
    return {"type", "_scope_", *(p.name for p in named if p.kind is not p.VAR_KEYWORD)}


def fit(config: Config, given: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Set the values of a config that follow from its network, in place.

    Args:
        config: of any task.
        given: dotted keys that the user has set; they stay unchanged.

    Raises:
        UserError: a network that the recipe cannot use.
    """
    holder = network_of(config)
    check_name(holder["name"])
    place = "model.backbone" if "backbone" in config.model else "model"
    asked = holder.get("drop_path_rate") is None or f"{place}.drop_path_rate" in given
    if not asked and not takes(holder["name"], "drop_path_rate"):
        del holder["drop_path_rate"]
    network = read_network(holder["name"], **network_arguments(config))
    groups = config.get("optim_wrapper", {}).get("paramwise_cfg") or {}
    if "layer_decay" in groups and "optim_wrapper.paramwise_cfg.layer_decay" not in given:
        groups["layer_decay"] = network.layer_decay
        if network.layer_decay is None:
            del groups["layer_decay"]
    if "backbone" in config.model:
        if config.model.type == "DINO":
            _fit_queries(config, given)
        _fit_dense(config.model, network, given)
    else:
        _fit_classifier(config, network, given)


def fit_dense(config: Config, given: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Set the network's widths in the necks and heads of a detector or segmentor, in place; nothing else changes."""
    backbone = config.model.backbone
    if backbone.get("type") == "PyramidBackbone":
        if config.model.type == "DINO":
            _fit_queries(config, given)
        _fit_dense(config.model, read_network(backbone["name"], **network_arguments(config)), given)


def _fit_classifier(config: Config, network: Network, given: set[str]) -> None:
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if not config.get(key):
            continue
        transform, where = config[key].dataset.transform, f"{key}.dataset.transform"
        facts = {"input_size": network.size, "mean": network.mean, "std": network.std}
        facts["interpolation"] = network.interpolation
        if not transform.get("is_training"):
            facts["crop_pct"] = network.crop_pct
        for name, value in facts.items():
            if f"{where}.{name}" not in given:
                transform[name] = value
    size = config.train_dataloader.dataset.transform.input_size
    size = size if isinstance(size, int) else size[-1]
    if size != network.size:
        for name, value in _for_size(network, size, network_arguments(config)).items():
            config.model.setdefault(name, value)


def _for_size(network: Network, size: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a network for images of another size than the published one."""
    published = timm.get_pretrained_cfg(network.name)
    fixed = published and published.fixed_input_size
    if fixed and "img_size" not in arguments and takes(network.name, "img_size", size):
        return {"img_size": size}
    return dict(network.any_size)


def completed(model: Any) -> Any:
    """A detector's or segmentor's config with the widths of its network, or None if it has them already.

    Only the widths of a neck, or of heads directly after the backbone, are compared.

    Raises:
        UserError: a network that the detector cannot use.
    """
    config = Config({"model": copy.deepcopy(dict(model))})
    model = config.model
    try:
        network = read_network(model.backbone["name"], **network_arguments(config))
        widths = [width for width, _ in _returned(model.backbone, network)]
    except UserError:  # building it gives a better error
        return None
    if _expects(model, widths):
        return None
    _fit_dense(model, network, set())
    return model


def _expects(model: Any, widths: list[int]) -> bool:
    """Whether the neck or heads after the backbone expect maps of these widths, as far as known."""
    neck = model.get("neck")
    if neck:
        stated = neck.get("in_channels") if isinstance(neck, dict) else None
        return not isinstance(stated, list | tuple) or list(stated) == widths
    for head in (model.get("decode_head"), model.get("auxiliary_head")):
        stated = head.get("in_channels") if isinstance(head, dict) else None
        index = head.get("in_index", -1) if isinstance(head, dict) else -1
        if isinstance(stated, int):
            index, stated = [index], [stated]
        elif not isinstance(index, list | tuple):
            index = range(len(widths))
        if isinstance(stated, list | tuple) and list(stated) != [widths[i] if i < len(widths) else 0 for i in index]:
            return False
    return True


def _returned(backbone: Any, network: Network) -> list[tuple[int, int]]:
    """(width, stride) of each map that a `PyramidBackbone` returns.

    Raises:
        UserError: a level that the network does not have.
    """
    from hybridzoo.train.backbone import pyramid

    info = [{"num_chs": width, "reduction": stride} for width, stride in network.levels]
    if backbone.get("strides"):
        return [(level.width, level.stride) for level in pyramid(info, backbone.strides)]
    indices = backbone.get("out_indices") or (0, 1, 2, 3)
    if max(indices) >= len(info):
        raise UserError(
            f"model {network.name}: has {len(info)} levels, the recipe takes {max(indices) + 1}; "
            "give model.backbone.strides=(4,8,16,32) instead of out_indices"
        )
    return [network.levels[index] for index in indices]


def _fit_dense(model: Any, network: Network, given: Collection[str]) -> None:
    backbone, neck = model.backbone, model.get("neck")
    for name, value in network.any_size:
        backbone.setdefault(name, value)
    own = sorted({stride for _, stride in network.levels})
    if neck and neck.get("type") in ("FPN", "FinerFPN") and "anchor_generator" in str(model) and len(own) > 1:
        wanted = _pyramid_strides(model)
        if wanted[0] < own[0] and "model.backbone.strides" not in given:
            # No level is as fine as the finest anchors: use the published neck of such networks.
            _finer_fpn(model, network, wanted)
            return
    if backbone.get("strides") and "model.backbone.strides" not in given:
        # Use all three stages of a network with three coarse stages.
        backbone.strides = (*backbone.strides, *(stride for stride in own if stride > max(backbone.strides)))
    widths, strides = (list(column) for column in zip(*_returned(backbone, network), strict=True))

    def put(node: Any, key: str, value: Any, where: str) -> None:
        if f"{where}.{key}" not in given:
            node[key] = value

    if neck:
        put(neck, "in_channels", widths, "model.neck")
        if "decode_head" in model:  # FPNHead takes every level of its neck
            put(neck, "num_outs", len(widths), "model.neck")
            put(model.decode_head, "in_channels", [neck.out_channels] * len(widths), "model.decode_head")
            put(model.decode_head, "in_index", list(range(len(widths))), "model.decode_head")
            put(model.decode_head, "feature_strides", strides, "model.decode_head")
        return
    head = model.decode_head
    single = isinstance(head.get("in_channels"), int)
    put(head, "in_channels", widths[head.get("in_index", -1)] if single else widths, "model.decode_head")
    if isinstance(head.get("in_index"), list | tuple):
        put(head, "in_index", list(range(len(widths))), "model.decode_head")
    if "strides" in head:  # Mask2Former's
        put(head, "strides", strides, "model.decode_head")
        if "pixel_decoder" in head:
            _fit_pixel_decoder(head, strides)
    for auxiliary in [model.get("auxiliary_head")] if isinstance(model.get("auxiliary_head"), dict) else []:
        index = auxiliary.get("in_index", -1)
        put(auxiliary, "in_channels", widths[index], "model.auxiliary_head")


def _fit_pixel_decoder(head: Any, strides: list[int]) -> None:
    """Mask2Former's pixel decoder attends over all levels but the finest; mmdet's takes one further level."""
    decoder = head.pixel_decoder
    decoder.strides = strides
    decoder.num_outs = head.num_transformer_feat_level = len(strides) - 1
    decoder.encoder.layer_cfg.self_attn_cfg.num_levels = len(strides) - 1


def _fit_queries(config: Config, given: set[str]) -> None:
    """At most as many queries as the padded images have tokens, and at most as many boxes as queries."""
    steps = [step for step in config.train_dataloader.dataset.get("pipeline", ()) if step.type == "Pad"]
    if not steps or "model.num_queries" in given:
        return
    side = min(steps[0].size)
    tokens = sum((-(-side // stride)) ** 2 for stride in (8, 16, 32, 64))
    config.model.num_queries = min(config.model.num_queries, tokens)
    config.model.test_cfg.max_per_img = min(config.model.test_cfg.max_per_img, config.model.num_queries)


def _pyramid_strides(model: Any) -> list[int]:
    head = model.get("rpn_head") or model.bbox_head
    return list(head.anchor_generator.strides)


def _finer_fpn(model: Any, network: Network, wanted: list[int]) -> None:
    """Replace the FPN by EfficientViT's (MSRA) neck, which computes the missing fine levels."""
    by_stride = {stride: (width, index) for index, (width, stride) in enumerate(network.levels)}
    own = sorted(stride for stride in by_stride if stride <= wanted[-1])
    finer = [stride for stride in wanted if stride < own[0]]
    coarser = [stride for stride in wanted if stride > own[-1]]
    if [*finer, *own, *coarser] != wanted:
        raise UserError(f"model {network.name}: its levels at strides {own} cannot give the pyramid {wanted}")
    backbone = model.backbone
    backbone.pop("strides", None)
    backbone.out_indices = tuple(by_stride[stride][1] for stride in own)
    model.neck = {
        "type": "FinerFPN",
        "in_channels": [by_stride[stride][0] for stride in own],
        "out_channels": model.neck.out_channels,
        "finer": len(finer),
        "coarser": len(coarser),
    }
