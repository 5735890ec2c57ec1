"""Detectors and segmentors: a published backbone inside one, with a norm for each of its maps, as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import Table, to_ours

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def convert_dense(state_dict: Mapping[str, Tensor], classifier: Convert, norms: Table) -> dict[str, Tensor]:
    """A classifier by `classifier`; a dense network to a `PyramidBackbone` with output norms, what is outside as it is.

    Args:
        state_dict: published; a whole detector's backbone is below `backbone.`.
        classifier: from the network without the norms to ours.
        norms: the norms' names, to `out_norms`.
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
