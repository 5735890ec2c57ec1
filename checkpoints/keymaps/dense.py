"""Detectors and segmentors: a published backbone inside one, with a norm for each of its maps, as ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def convert_dense(state_dict: Mapping[str, Tensor], classifier: Convert, norms: str) -> dict[str, Tensor]:
    """A classifier by `classifier`; a dense network to a `PyramidBackbone` with output norms, what is outside as it is.

    Args:
        state_dict: published; a whole detector's backbone is below `backbone.`.
        classifier: key map of the network without the norms.
        norms: pattern of the norms' names, its group the level.
    """
    inside = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    if inside:
        outside = {k: v for k, v in state_dict.items() if not k.startswith("backbone.")}
        return {f"backbone.{k}": v for k, v in convert_dense(inside, classifier, norms).items()} | outside
    out_norms = {re.sub(norms, r"out_norms.\1.", key): v for key, v in state_dict.items() if re.match(norms, key)}
    network = classifier({key: v for key, v in state_dict.items() if not re.match(norms, key)})
    return {f"model.{key}": v for key, v in network.items()} | out_norms if out_norms else network
