"""Shared by the three hosts that are pyramids: four stages of NHWC maps, and a classifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates
from torch import nn

from hybridzoo.backbones.base import Backbone, check_per_stage
from hybridzoo.backbones.hosts.common import Attention
from hybridzoo.layers import Stage
from hybridzoo.layers.init import init_linear

STRIDES = (4, 8, 16, 32)


class Pyramid(Backbone):
    """A network of four stages for images of any size from 32 x 32 pixels; a host defines their parts.

    Args:
        cfg: the variant, with `depths` and `dims`; its fields are also arguments of `timm.create_model`.
        attention: the family's attention on `(B, H, W, dim)` maps.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, … or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Attributes:
        per_stage: fields of `cfg` that have an entry for every stage.
    """

    layout = "NHWC"
    per_stage: tuple[str, ...] = ("depths", "num_heads", "linear")

    def __init__(
        self,
        cfg: Any,
        attention: Attention,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_per_stage(len(STRIDES), **{name: getattr(cfg, name) for name in self.per_stage})
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, STRIDES)
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))
        self.stem = self.make_stem(cfg, in_chans)
        stages = []
        for i, depth in enumerate(cfg.depths):
            blocks = [self.make_block(cfg, attention, i, j, next(rates)) for j in range(depth)]
            stages.append(Stage(blocks, self.make_downsampling(cfg, i) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = self.make_norm(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def make_stem(self, cfg: Any, in_chans: int) -> nn.Module:
        """Image -> `(B, H/4, W/4, dims[0])`."""
        raise NotImplementedError

    def make_block(self, cfg: Any, attention: Attention, stage: int, index: int, drop_path: float) -> nn.Module:
        """The block `index` of `stage`, both from 0."""
        raise NotImplementedError

    def make_downsampling(self, cfg: Any, stage: int) -> nn.Module:
        """The map of the previous stage -> that of `stage`, from 1."""
        raise NotImplementedError

    def make_norm(self, dim: int) -> nn.Module:
        """The norm of the last map, NCHW."""
        return LayerNorm2d(dim, eps=1e-5)


def doubled(dim: int, depths: tuple[int, ...]) -> tuple[int, ...]:
    """Channels of the stages: `dim`, and twice as many after each."""
    return tuple(dim * 2**i for i in range(len(depths)))
