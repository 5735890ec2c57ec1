"""How the families' own blocks are fused for inference, see `hybridzoo.layers.inference`."""

from __future__ import annotations

from hybridzoo.backbones import patnet
from hybridzoo.layers.inference import folds
from hybridzoo.layers.inference.partial import FusedPartialConv, fold_channel_attention, fold_spatial_gate
from hybridzoo.layers.partial_attention import DynamicPartialConv, PartialChannelAttention, SpatialGate


@folds(patnet.Block)
def _(block: patnet.Block) -> None:
    """The mixer's norms and the spatial gate's linear maps, into the MLP's convolutions."""
    mlp = block.mlp
    if isinstance(block.mixer, PartialChannelAttention):
        block.mixer, mlp.expand.conv = fold_channel_attention(block.mixer, mlp.expand.conv)
    elif isinstance(block.mixer, DynamicPartialConv):
        block.mixer = FusedPartialConv(block.mixer)
    if isinstance(mlp.gate, SpatialGate):
        mlp.project, mlp.gate = fold_spatial_gate(mlp.gate, mlp.project)
