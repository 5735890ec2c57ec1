"""The formula, one query at a time. For tests in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hybridzoo.kernels.neighborhood.reference import axis_table


def neighborhood_mix2d(
    query: Tensor,
    taps: Tensor,
    value: Tensor,
    tap_bias: Tensor | None,
    rpb: Tensor | None,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """In the dtype of `query`. Differentiable."""
    rows, columns = (axis_table(*axis) for axis in zip(query.shape[1:3], kernel, dilation, strict=True))
    out = []
    for (y, (keys_h, entries_h)), (x, (keys_w, entries_w)) in itertools.product(enumerate(rows), enumerate(columns)):
        seen = torch.arange(kernel[0] * kernel[1]).view(kernel)[: len(keys_h), : len(keys_w)].flatten()
        scores = scale * torch.einsum("bhd,bhtd->bht", query[:, y, x], taps[:, :, seen])
        if tap_bias is not None:
            scores = scores + tap_bias[:, seen]
        if rpb is not None:
            scores = scores + rpb[:, entries_h][:, :, entries_w].flatten(1)
        window = value[:, keys_h][:, :, keys_w].flatten(1, 2)
        out.append(torch.einsum("bht,bthe->bhe", scores.softmax(-1), window))
    return torch.stack(out, 1).view(*query.shape[:4], value.shape[4])
