"""RAVLT's attentions against the published modules, and their formula."""

from __future__ import annotations

import goldens
import pytest
import torch
from torch import Tensor

from hybridzoo.checkpoints import convert
from hybridzoo.layers import GatedAttention, RankAugmentedAttention
from hybridzoo.layers.rank_augmented_attention import rank_augmented_attention
from hybridzoo.layers.rotary import Rotary2d, rotate

CORES = [n for n in goldens.names("ops", numeric=True) if n.startswith("rala_core_")]
MODULES = [n for n in goldens.names("ops", numeric=True) if n.startswith(("rala_module_", "gated_rope_module_"))]


@pytest.mark.parametrize("name", CORES)
def test_published_operator_values_and_gradients(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    inputs = [data[key].requires_grad_() for key in "qkv"]
    height, width = meta["map_size"]
    rotation = Rotary2d(meta["d"])(height, width, torch.float64, torch.device("cpu"))
    out = rank_augmented_attention(*inputs, rotation)
    out.backward(data["grad_out"])
    for key, tensor in [("out", out), *((f"grad_{k}", t.grad) for k, t in zip("qkv", inputs, strict=True))]:
        if height * width == 1:  # cancellation leaves gradients of 1e-7, and a single value no deviation
            torch.testing.assert_close(tensor, data[key], rtol=1e-9, atol=1e-12)
        else:
            goldens.assert_close(tensor, data[key])


def ours(data: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """A module's published parameters, or their gradients, under our names and shapes."""
    prefix = "layers.0.blocks.0.attn."
    published = {prefix + k.removeprefix(group): v for k, v in data.items() if k.startswith(group)}
    return {k.removeprefix("stages.0.blocks.0.attn."): v for k, v in convert(published, "ravlt_tiny").items()}


@pytest.mark.parametrize("name", MODULES)
def test_published_module_values_and_gradients(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    kind = RankAugmentedAttention if name.startswith("rala") else GatedAttention
    layer = kind(meta["C"], meta["heads"]).double()
    layer.load_state_dict(ours(data, "param."))
    x = data["x"].requires_grad_()
    out = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    goldens.assert_close(x.grad, data["grad_x"])
    grads = ours(data, "grad.")
    for key, parameter in layer.named_parameters():
        goldens.assert_close(parameter.grad, grads[key])


def test_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    rotation = Rotary2d(8)(2, 3, torch.float64, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda *qkv: rank_augmented_attention(*qkv, rotation), inputs)
    assert torch.autograd.gradcheck(rank_augmented_attention, inputs)


def test_a_rotation_keeps_lengths_and_depends_only_on_distances():
    torch.manual_seed(0)
    rotation = Rotary2d(16)(5, 7, torch.float64, torch.device("cpu"))
    query, key = (torch.randn(16, dtype=torch.float64).expand(1, 1, 35, 16) for _ in range(2))
    torch.testing.assert_close(rotate(query, rotation).norm(dim=-1), query.norm(dim=-1))
    scores = (rotate(query, rotation) @ rotate(key, rotation).mT).view(5, 7, 5, 7)
    torch.testing.assert_close(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_large_maps_are_accurate_under_autocast(dtype):
    torch.manual_seed(0)
    query, key, value = (3 * torch.randn(1, 1, 96 * 96, 16) for _ in range(3))
    expected = rank_augmented_attention(*(t.to(dtype).double() for t in (query, key, value)))
    with torch.autocast("cpu", dtype):
        out = rank_augmented_attention(*(t.to(dtype) for t in (query, key, value)))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-3 * expected.abs().max().item())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads; got dim=30, num_heads=4"):
        GatedAttention(30, 4)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4"):
        RankAugmentedAttention(12, 2)
