"""Agent attention on four hosts: DeiT, PVT, Swin and CSwin.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", Han et al., ECCV 2024, arXiv 2312.08874.
Published code and weights: LeapLabTHU/Agent-Attention, which states no licence. Written from the paper and from
measurements of that code. The hosts are in `hosts/`, the attention is `hybridzoo.layers.AgentAttention`.

Stochastic depth of the published runs: DeiT 0, 0.1, 0.3; PVT 0.1, 0.1, 0.3, 0.3; Swin 0.2, 0.3, 0.5; CSwin 0.2, 0.4,
0.5 (0.7 at 384), from the smallest to the largest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from timm.models import register_model
from torch import nn

from hybridzoo.backbones import hosts
from hybridzoo.backbones.base import build
from hybridzoo.backbones.hosts import ALL
from hybridzoo.backbones.hosts.common import Attention
from hybridzoo.layers import AgentAttention

Grid = Literal["trained", "dense"] | Sequence[int | tuple[int, int]]
"""Agent tokens of each stage; `"trained"` as the bias tables, `"dense"` as published for detection and segmentation."""


@dataclasses.dataclass(frozen=True)
class AgentDeiTConfig(hosts.DeiTConfig):
    """`agents`: rows (and columns) of each stage's agent tokens."""

    agents: tuple[int, ...] = (7, 7, 7, 7)


@dataclasses.dataclass(frozen=True)
class AgentPVTConfig(hosts.PVTConfig):
    """`agents`: rows (and columns) of each stage's agent tokens."""

    agents: tuple[int, ...] = (3, 4, 7, 7)


@dataclasses.dataclass(frozen=True)
class AgentSwinConfig(hosts.SwinConfig):
    """`agents`: rows (and columns) of each stage's agent tokens."""

    agents: tuple[int, ...] = (3, 4, 7, 7)


@dataclasses.dataclass(frozen=True)
class AgentCSwinConfig(hosts.CSwinConfig):
    """`agents`: rows (and columns) of each stage's agent tokens."""

    agents: tuple[int, ...] = (3, 4, 7, 7)


class AgentDeiT(hosts.DeiT):
    """Agent-DeiT. `agent_grid`: see `Grid`; other arguments: see `hosts.DeiT`."""

    def __init__(self, cfg: AgentDeiTConfig, agent_grid: Grid = "trained", **kwargs: Any) -> None:
        super().__init__(cfg, _attention(cfg.agents, agent_grid, class_token=True), **kwargs)


class AgentPVT(hosts.PVT):
    """Agent-PVT. `agent_grid`: see `Grid`; other arguments: see `hosts.PVT`."""

    def __init__(self, cfg: AgentPVTConfig, agent_grid: Grid = "trained", **kwargs: Any) -> None:
        super().__init__(cfg, _attention(cfg.agents, agent_grid, dense=(12, 16, 28, 28)), **kwargs)


class AgentSwin(hosts.Swin):
    """Agent-Swin. `agent_grid`: see `Grid`; other arguments: see `hosts.Swin`."""

    def __init__(self, cfg: AgentSwinConfig, agent_grid: Grid = "trained", **kwargs: Any) -> None:
        super().__init__(cfg, _attention(cfg.agents, agent_grid, dense=(9, 12, 14, 7)), **kwargs)


class AgentCSwin(hosts.CSwin):
    """Agent-CSwin. `agent_grid`: see `Grid`; other arguments: see `hosts.CSwin`."""

    def __init__(self, cfg: AgentCSwinConfig, agent_grid: Grid = "trained", **kwargs: Any) -> None:
        super().__init__(cfg, _attention(cfg.agents, agent_grid), **kwargs)


def _attention(
    agents: Sequence[int], grid: Grid, *, dense: Sequence[int] | None = None, class_token: bool = False
) -> Attention:
    """The hosts' factory of attention layers."""
    if grid == "dense" and dense is None:
        raise ValueError("agent_grid='dense' was published for PVT and Swin only; give this host one grid a stage")
    if isinstance(grid, str) and grid not in ("trained", "dense"):
        raise ValueError(f"agent_grid must be 'trained', 'dense' or one grid a stage; got {grid!r}")
    grids = agents if grid == "trained" else dense if grid == "dense" else grid
    if grids is None or len(grids) != len(agents):
        raise ValueError(f"agent_grid must have one grid for each of {len(agents)} stages; got {grid}")

    def layer(stage: int, dim: int, num_heads: int, side: int) -> nn.Module:
        return AgentAttention(dim, num_heads, agents[stage], side, grid=grids[stage], class_token=class_token)

    return layer


VARIANTS = {
    "agent_deit_tiny": AgentDeiTConfig(192, 3),
    "agent_deit_small": AgentDeiTConfig(384, 6),
    "agent_deit_base": AgentDeiTConfig(768, 12, linear=(ALL, 1, 0, 0), agents=(9, 9, 9, 9)),
    "agent_pvt_tiny": AgentPVTConfig((2, 2, 2, 2), (1, 2, 5, 8)),
    "agent_pvt_small": AgentPVTConfig((3, 4, 6, 3), (1, 2, 5, 8)),
    "agent_pvt_medium": AgentPVTConfig((3, 4, 18, 3), (1, 2, 5, 8)),
    "agent_pvt_large": AgentPVTConfig((3, 8, 27, 3), (1, 2, 5, 8)),
    "agent_swin_tiny": AgentSwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "agent_swin_small": AgentSwinConfig(96, (2, 2, 18, 2), (3, 6, 12, 24), linear=(ALL, ALL, 0, 0)),
    "agent_swin_base": AgentSwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), linear=(ALL, ALL, 2, 0)),
    "agent_cswin_tiny": AgentCSwinConfig(64, (2, 4, 18, 1), (2, 4, 8, 16)),
    "agent_cswin_small": AgentCSwinConfig(64, (3, 6, 29, 2), (2, 4, 8, 16)),
    "agent_cswin_base": AgentCSwinConfig(96, (3, 6, 29, 2), (4, 8, 16, 32)),
}

default_cfgs = hosts.default_cfgs("agent")


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    return build(AgentDeiT, VARIANTS, "agent_deit_tiny", pretrained, **kwargs)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    return build(AgentDeiT, VARIANTS, "agent_deit_small", pretrained, **kwargs)


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    return build(AgentDeiT, VARIANTS, "agent_deit_base", pretrained, **kwargs)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    return build(AgentPVT, VARIANTS, "agent_pvt_tiny", pretrained, **kwargs)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    return build(AgentPVT, VARIANTS, "agent_pvt_small", pretrained, **kwargs)


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    return build(AgentPVT, VARIANTS, "agent_pvt_medium", pretrained, **kwargs)


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Published as "agent_pvt_b"."""
    return build(AgentPVT, VARIANTS, "agent_pvt_large", pretrained, **kwargs)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    return build(AgentSwin, VARIANTS, "agent_swin_tiny", pretrained, **kwargs)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    return build(AgentSwin, VARIANTS, "agent_swin_small", pretrained, **kwargs)


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    return build(AgentSwin, VARIANTS, "agent_swin_base", pretrained, **kwargs)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    return build(AgentCSwin, VARIANTS, "agent_cswin_tiny", pretrained, **kwargs)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    return build(AgentCSwin, VARIANTS, "agent_cswin_small", pretrained, **kwargs)


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    return build(AgentCSwin, VARIANTS, "agent_cswin_base", pretrained, **kwargs)
