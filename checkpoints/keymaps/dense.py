"""Detectors and segmentors: converts the published backbone, which has a norm for each of its maps, to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import Table, to_ours

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def convert_dense(state_dict: Mapping[str, Tensor], classifier: Convert, norms: Table) -> dict[str, Tensor]:
    """Convert a classifier, or the backbone of a detector or segmentor to a `PyramidBackbone` with output norms.

    Tensors outside of the backbone stay unchanged.

    Args:
        state_dict: published; the names of a whole detector's backbone begin with `backbone.`.
        classifier: converts the network without the output norms.
        norms: the names of the output norms, to `out_norms`.
    """
    inside = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    if inside:
        outside = {k: v for k, v in state_dict.items() if not k.startswith("backbone.")}
        return {f"backbone.{k}": v for k, v in convert_dense(inside, classifier, norms).items()} | outside
    out_norms = {to_ours(name, norms): v for name, v in state_dict.items() if to_ours(name, norms) != name}
    if not out_norms:
        return classifier(state_dict)
    network = classifier({name: v for name, v in state_dict.items() if to_ours(name, norms) == name})
    return {f"model.{key}": v for key, v in network.items()} | out_norms
