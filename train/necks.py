"""Necks that mmdet does not have."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from hybridzoo.train.errors import UserError


@MODELS.register_module()
class FinerFPN(BaseModule):
    """A feature pyramid with finer strides than its backbone, as in EfficientViT (MSRA) and SHViT for detection.

    Maps (B, in_channels[i], H_i, W_i), fine to coarse -> maps (B, out_channels, ..), fine to coarse, for instance
    strides 16, 32, 64 -> 4, 8, 16, 32, 64 with ``finer=2``. 1 x 1 laterals; sums from coarse to fine with
    nearest-neighbour upsampling; each finer level by a 2 x 2 transposed convolution from the one below it, the first
    from the finest sum; a 3 x 3 convolution on every level. Neither norms nor activations.

    Args:
        in_channels: width of each of the backbone's maps.
        out_channels: width of every returned map.
        finer: how many levels to add at the fine end.
        coarser: how many to add at the coarse end, each by a 3 x 3 convolution of stride 2, the first from the
            backbone's last map.

    Raises:
        UserError: the number of maps differs from `in_channels`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        finer: int = 0,
        coarser: int = 0,
        init_cfg: dict[str, object] | None = None,
    ) -> None:
        super().__init__(init_cfg or {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"})
        self.laterals = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in in_channels)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(out_channels, out_channels, 2, stride=2) for _ in range(finer))
        self.convs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(finer + len(in_channels))
        )
        widths = [in_channels[-1], *([out_channels] * coarser)]
        self.downs = nn.ModuleList(nn.Conv2d(widths[i], out_channels, 3, stride=2, padding=1) for i in range(coarser))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(maps) != len(self.laterals):
            raise UserError(f"FinerFPN: got {len(maps)} maps, in_channels names {len(self.laterals)}")
        sums = [lateral(level) for lateral, level in zip(self.laterals, maps, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[-2:], mode="nearest")
        for up in self.ups:
            sums.insert(0, up(sums[0]))
        levels = [conv(level) for conv, level in zip(self.convs, sums, strict=True)]
        level = maps[-1]
        for down in self.downs:
            level = down(level)
            levels.append(level)
        return tuple(levels)
