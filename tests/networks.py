"""The registered networks, and small ones of every structure, for tests that are the same for all of them."""

from __future__ import annotations

import copy
import functools
import re
import sys

import goldens
import pytest
import timm
import torch
from timm.models import model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

import hybridzoo  # noqa: F401  (registers the models)
from hybridzoo.checkpoints import Card

MODELS = [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith("hybridzoo.")]


def variants(name: str) -> dict:
    return sys.modules[model_entrypoint(name).__module__].VARIANTS


def _leaders() -> list[str]:
    """The first, smallest variant of every structure: what only differs in sizes compiles and exports alike.

    Sizes are a row's numbers and tuples; its switches (booleans, strings) and its name's first words are the structure.
    """
    leaders: dict[tuple, str] = {}
    for module in dict.fromkeys(model_entrypoint(name).__module__ for name in MODELS):
        for name, row in sys.modules[module].VARIANTS.items():
            switches = tuple((k, v) for k, v in sorted(vars(row).items()) if isinstance(v, bool | str))
            leaders.setdefault((name.rpartition("_")[0], switches), name)
    return sorted(leaders.values(), key=MODELS.index)


LEADERS = _leaders()
# One of each family, but not of the isotropic nets, which are built of DiNAT's blocks; and those that are built of
# different blocks or otherwise, the hosts of linear attention included.
FAMILIES = list({model_entrypoint(name).__module__: name for name in reversed(LEADERS)}.values())
FAMILIES.remove("dinat_isotropic_small")
OTHERS = ("dat_plus_tiny", "dinat_isotropic_small", "efficientvit_mit_l1", "vitrpb_small")
BLOCKS = {*FAMILIES, *(name for name in LEADERS if name.startswith("agent_")), *OTHERS}


def one_block_a_stage(name: str) -> dict[str, tuple]:
    return blocks_a_stage(name, 1)


def blocks_a_stage(name: str, most: int) -> dict[str, tuple]:
    """Arguments for so many blocks a stage; where a pattern names the kind of every block, of each kind."""
    row = vars(variants(name)[name])
    fewer = {key: tuple(min(most, depth) for depth in value) for key, value in row.items() if key.endswith("depths")}
    if "pattern" in row:
        fewer["pattern"] = tuple(re.sub(r"(.)\1*", lambda same: same[0][:most], blocks) for blocks in row["pattern"])
    return fewer


def size(name: str) -> dict[str, tuple]:
    """Arguments that keep the variant quick: two blocks a stage of a leader, since neighbours differ (windows shift,
    dilations alternate), one of others. What depends on the depth (names, layer decay, parameters, cards) is tested of
    all variants without running them; full networks are compared with the published ones.
    """
    return blocks_a_stage(name, 2 if name in LEADERS else 1)


# A stage with the same kinds of layers as another one keeps its downsampling alone, or (MaxViT: downsampling is in
# a block) is left out. Tracing takes time for every operator, drawing for every weight.
FEWER: dict[str, dict[str, tuple]] = dict(
    agent_cswin_tiny=dict(depths=(1, 0, 1, 1)),
    agent_swin_tiny=dict(depths=(1, 0, 0, 1)),
    biformer_stl=dict(depths=(0, 1, 0, 1)),
    dat_plain_tiny=dict(depths=(1, 0, 0, 1)),
    dinat_mini=dict(depths=(1, 0, 0, 1)),
    efficientvit_mit_b0=dict(depths=(1, 0, 0, 1)),
    efficientvit_msra_m0=dict(depths=(1, 0, 1), heads=(2, 2, 2), kernel_sizes=(5, 5)),
    fastervit_0=dict(depths=(1, 0, 1, 1)),
    inline_cswin_tiny=dict(depths=(1, 0, 1, 1)),
    litv2_small=dict(depths=(1, 0, 1, 1)),
    maxvit_tiny=dict(dims=(64, 64, 64, 64)),
    partialnet_t0=dict(depths=(1, 0, 0, 1)),
    patnet_t0=dict(depths=(1, 0, 0, 1)),
    ravlt_tiny=dict(depths=(1, 0, 0, 1)),
)


def shallow(name: str) -> torch.nn.Module:
    """A variant with every kind of layer that `few_blocks` has, mostly once: for what every kind has to show."""
    return copy.deepcopy(_shallow(name))


@functools.lru_cache(maxsize=1)  # tests go model by model (see `conftest`), and random weights take long to draw
def _shallow(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **few_blocks(name) | FEWER.get(name, {})).eval()
    if name == "maxvit_tiny":
        model.stages = model.stages[:2]
    return model


def few_blocks(name: str) -> dict[str, tuple]:
    """Arguments for one block a stage (one of each kind) and four stages at most."""
    row = vars(variants(name)[name])
    fewer = {key: value[:4] for key, value in row.items() if isinstance(value, tuple)}
    return fewer | {key: value[:4] for key, value in one_block_a_stage(name).items()}


def skeleton(name: str, **arguments) -> torch.nn.Module:
    """A network on the meta device: for its names and shapes."""
    with torch.device("meta"), goldens.Undrawn():
        return timm.create_model(name, **arguments)


def image(height=64, width=96, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def leaders_of(names) -> list:
    """All leaders, those besides `names` in exhaustive runs only."""
    return mostly(LEADERS, names)


def variants_too(names=LEADERS) -> list:
    """All models, those that differ from one of `names` in sizes only in exhaustive runs."""
    return mostly(MODELS, names)


def costs_of(cards) -> list:
    """These cards, in exhaustive runs; else a leader's first: the others' networks are counted in the same way."""
    first = {}
    for card in cards:
        first.setdefault(card.model, card)
    return mostly(list(cards), [first[name] for name in LEADERS if name in first])


def gmacs(model: torch.nn.Module, *shape: int) -> float:
    """A network's GMACs on the meta device, for one image `(3, H, W)` or one of so many pixels a side."""
    size = shape if len(shape) == 3 else (3, *shape, *shape)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, *size))
    return counter.get_total_flops() / 2e9


def assert_cost(card: Card, uncounted: float = 0.0, **tolerance: float) -> torch.nn.Module:
    """A card's network, on the meta device, has its parameters and its GMACs, by PyTorch's counter of operators.

    `uncounted`: GMACs that the card leaves out.
    """
    model = skeleton(card.name)
    assert sum(p.numel() for p in model.parameters()) == card.params
    assert model.num_classes == card.num_classes
    assert gmacs(model, *card.input_size) - uncounted == pytest.approx(card.gmacs, **tolerance)
    return model


def mostly(names, usual) -> list:
    """All names, those not among `usual` in exhaustive runs only."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]
