"""Blocks that families share, and the attention layers."""

from hybridzoo.layers.agent_attention import AgentAttention
from hybridzoo.layers.bi_level_routing import BiLevelRoutingAttention
from hybridzoo.layers.cascaded_group_attention import CascadedGroupAttention
from hybridzoo.layers.context_mixing import ContextMixing
from hybridzoo.layers.conv_norm_act import ConvNormAct
from hybridzoo.layers.coordinate_position import CoordinateBias, CoordinateEmbedding
from hybridzoo.layers.deformable_attention import DeformableAttention
from hybridzoo.layers.deformable_merging import DeformableMerging
from hybridzoo.layers.depthwise_mlp import DepthwiseMlp
from hybridzoo.layers.dilated_reparam import DilatedReparamConv
from hybridzoo.layers.head import PooledHead
from hybridzoo.layers.hilo_attention import HiLoAttention
from hybridzoo.layers.inline_attention import InLineAttention
from hybridzoo.layers.linear_attention import MultiScaleLinearAttention
from hybridzoo.layers.mbconv import FusedMBConv, MBConv, PoolShortcut
from hybridzoo.layers.neighborhood import NeighborhoodAttention2d
from hybridzoo.layers.rank_augmented_attention import GatedAttention, RankAugmentedAttention
from hybridzoo.layers.relative_position import RelativePositionBias
from hybridzoo.layers.residual import Residual
from hybridzoo.layers.stage import Stage
from hybridzoo.layers.transformer_block import TransformerBlock
from hybridzoo.layers.window_attention import ShiftedWindowAttention, WindowAttention

__all__ = [
    "AgentAttention",
    "BiLevelRoutingAttention",
    "CascadedGroupAttention",
    "ContextMixing",
    "ConvNormAct",
    "CoordinateBias",
    "CoordinateEmbedding",
    "DeformableAttention",
    "DeformableMerging",
    "DepthwiseMlp",
    "DilatedReparamConv",
    "FusedMBConv",
    "GatedAttention",
    "HiLoAttention",
    "InLineAttention",
    "MBConv",
    "MultiScaleLinearAttention",
    "NeighborhoodAttention2d",
    "PoolShortcut",
    "PooledHead",
    "RankAugmentedAttention",
    "RelativePositionBias",
    "Residual",
    "ShiftedWindowAttention",
    "Stage",
    "TransformerBlock",
    "WindowAttention",
]
