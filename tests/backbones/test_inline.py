"""The networks with InLine attention equal the published ones, and their cost is that on the cards."""

from __future__ import annotations

import math
import re

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of, gmacs, one_block_a_stage

from hybridzoo.checkpoints import cards, convert

MANIFESTS = goldens.names("inline", numeric=False)


def model_of(fixture: str) -> torch.nn.Module:
    name, size = re.match(r"(inline_[a-z]+_[a-z]+?)(?:_(\d+))?(?:_256x320)?$", fixture).groups()
    return timm.create_model(name, **dict(img_size=int(size)) if size else {})


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    meta = goldens.manifest("inline", fixture)
    with torch.device("meta"):
        model = model_of(fixture)
    converted = convert(goldens.published_shapes("inline", fixture), fixture)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    assert convert(converted, fixture).keys() == converted.keys()


def test_a_file_without_a_local_kernel_is_refused():
    state = goldens.published_state("inline", "inline_pvt_tiny")
    model = timm.create_model("inline_pvt_tiny")
    for key in [key for key in state if key.startswith("block3.1.attn.residual")]:
        del state[key]
    with pytest.raises(RuntimeError, match=r"stages\.2\.blocks\.1\.attn\.residual\.0\.weight"):
        model.load_state_dict(convert(state, "inline_pvt_tiny"))


@pytest.mark.parametrize("fixture", goldens.names("inline", numeric=True))
def test_equals_the_published_network(fixture):
    model = goldens.network(model_of, fixture)
    model.load_state_dict(convert(goldens.published_state("inline", fixture), fixture))
    goldens.assert_outputs(model, "inline", fixture)


def test_equals_the_published_cswin_block():
    """The kernels come from the block's input before the norm; all gradients."""
    name = "inline_block_cswin_8x8_c32_h2"
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    model = timm.create_model("inline_cswin_tiny", dim=32, depths=(1, 1, 1, 1), num_heads=(2, 4, 8, 16))
    block = model.stages[0].blocks[0].double()
    assert block.attn.num_heads == meta["heads"]
    prefix = "stage1.0."
    ours = {
        group: {
            key.removeprefix("stages.0.blocks.0."): value
            for key, value in convert(
                {prefix + k.removeprefix(group): v for k, v in data.items() if k.startswith(group)}, "inline_cswin_tiny"
            ).items()
        }
        for group in ("param.", "grad.")
    }
    block.load_state_dict(ours["param."])
    size = tuple(meta["map_size"])
    x = data["x"].unflatten(1, size).requires_grad_()
    out = block(x)
    goldens.assert_close(out.flatten(1, 2), data["out"])
    out.backward(data["grad_out"].unflatten(1, size))
    goldens.assert_close(x.grad.flatten(1, 2), data["grad_x"])
    for key, parameter in block.named_parameters():
        goldens.assert_close(parameter.grad, ours["grad."][key])


@pytest.mark.parametrize("card", costs_of(cards("inline*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    """The published form computes one product more, less than a hundredth of all."""
    assert_cost(card, rel=5e-3)


@pytest.mark.parametrize("name", ["inline_deit_tiny", "inline_pvt_tiny", "inline_swin_tiny"])
def test_cost_is_linear_in_the_area(name):
    """Of multiplications, from 224 to 1792 px."""
    with torch.device("meta"):
        model = timm.create_model(name, **one_block_a_stage(name))
    few, many = (gmacs(model, side) for side in (224, 1792))
    assert math.log(many / few) / math.log(64) < 1.05


def test_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="agent_grid"):
        timm.create_model("inline_pvt_tiny", agent_grid="dense")
