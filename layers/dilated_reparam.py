"""A large depthwise convolution that trains in parallel with smaller dilated ones, and can be merged with them.

UniRepLKNet (Ding et al., CVPR 2024, arXiv 2311.15599), section 3.1: dilated re-parameterisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hybridzoo.layers.conv_norm_act import ConvNormAct

# Kernel -> the kernels of its parallel branches and their dilations, as published.
BRANCHES = {
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class DilatedReparamConv(nn.Module):
    """Depthwise convolution with batch norm, plus a smaller such pair for each branch; or all of it as one convolution.

    `(B, dim, H, W)` in and out, zeros beyond the edge.

    Args:
        dim: channels.
        kernel_size: side of the large kernel, one of `BRANCHES`.
        merged: one convolution with a bias, which equals the module in evaluation.

    Attributes:
        conv: the convolution, if `merged`.
        large, branches: convolutions with their norms, otherwise.

    Raises:
        ValueError: a kernel for which no branches are published.
    """

    def __init__(self, dim: int, kernel_size: int, merged: bool = False) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f"kernel_size must be one of {', '.join(map(str, BRANCHES))}; got {kernel_size!r}")
        self.kernel_size = kernel_size
        self.merged = merged
        if merged:
            self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
            return
        self.large = ConvNormAct(dim, dim, kernel_size, groups=dim)
        self.branches = nn.ModuleDict(
            {f"k{k}_{d}": ConvNormAct(dim, dim, k, groups=dim, dilation=d) for k, d in BRANCHES[kernel_size]}
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.conv(x)
        y = self.large(x)
        for branch in self.branches.values():
            y = y + branch(x)
        return y

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """The convolution with a bias that equals this module in evaluation, in the weights' precision."""
        if self.merged:
            return self.conv
        conv = _folded(self.large)
        assert conv.bias is not None
        weight, bias = conv.weight.clone(), conv.bias.clone()
        for branch in self.branches.values():
            small = _folded(branch)
            assert small.bias is not None
            weight += _spread(small.weight, small.dilation[0], self.kernel_size)
            bias += small.bias
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        return conv

    @torch.no_grad()
    def fit_state(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Convert a state dict in which this module, named `prefix`, may have the other form, to the form of this
        module.

        A merged convolution becomes the large one with an identity norm, and the branches get norms that start at zero.
        """
        state, mine = dict(state), f"{prefix}." if prefix else ""
        if self.merged and f"{mine}large.conv.weight" in state:
            source = DilatedReparamConv(self.conv.in_channels, self.kernel_size).to(state[f"{mine}large.conv.weight"])
            names = [name for name in state if name.startswith((f"{mine}large.", f"{mine}branches."))]
            source.load_state_dict({name.removeprefix(mine): state.pop(name) for name in names})
            conv = source.merge()
            state |= {f"{mine}conv.weight": conv.weight.detach(), f"{mine}conv.bias": conv.bias.detach()}  # type: ignore[union-attr]
        elif not self.merged and f"{mine}conv.weight" in state:
            weight, bias = state.pop(f"{mine}conv.weight"), state.pop(f"{mine}conv.bias")
            unfolded: dict[str, Any] = {name: value.detach().clone() for name, value in self.state_dict().items()}
            for name, value in unfolded.items():
                if ".norm." in name:
                    value.fill_(name.endswith(".running_var"))
            unfolded["large.conv.weight"] = weight
            unfolded["large.norm.weight"].fill_((1 + self.large.norm.eps) ** 0.5)  # type: ignore[operator]
            unfolded["large.norm.bias"] = bias
            state |= {f"{mine}{name}": value for name, value in unfolded.items()}
        return state


def _folded(block: Any) -> nn.Conv2d:
    """A convolution with its norm inside it."""
    return (
        block.conv if isinstance(block.norm, nn.Identity) else fuse_conv_bn_eval(block.conv.eval(), block.norm.eval())
    )


def _spread(weight: Tensor, dilation: int, size: int) -> Tensor:
    """A dilated kernel as a dense one of `size`: with zeros between its values, and centred."""
    reach = dilation * (weight.shape[-1] - 1) + 1
    wide = weight.new_zeros(*weight.shape[:2], reach, reach)
    wide[..., ::dilation, ::dilation] = weight
    return F.pad(wide, [(size - reach) // 2] * 4)
