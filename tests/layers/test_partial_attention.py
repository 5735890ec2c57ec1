"""PATNet's layers against their formulas, folding, and what the published code gets wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridzoo.layers.inference.partial import FusedPartialConv, fold_channel_attention, fold_spatial_gate
from hybridzoo.layers.partial_attention import (
    BUCKETS,
    DistanceBias,
    DynamicPartialConv,
    PartialAttention,
    PartialChannelAttention,
    SpatialGate,
    distance_bucket,
    group_mask,
    mean_std,
)


def test_mean_std_is_torchs_with_its_gradient():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    mean, std = mean_std(x)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    torch.testing.assert_close(std, x.std((2, 3)))
    torch.autograd.gradcheck(mean_std, x)


def test_constant_channels_and_single_pixels_deviate_by_zero_without_nan():
    for shape in ((1, 2, 4, 4), (1, 2, 1, 1)):
        x = torch.full(shape, 0.1, requires_grad=True)
        mean, std = mean_std(x)
        (mean + std).sum().backward()
        assert std.abs().max() < 1e-7
        torch.testing.assert_close(x.grad, torch.full(shape, 1 / (shape[2] * shape[3])))


def test_mean_std_keeps_float32_precision_for_half_inputs_far_from_zero():
    x = (100 + torch.randn(1, 4, 32, 32)).to(torch.bfloat16)
    mean, std = mean_std(x)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(std, x.double().std((2, 3)).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 10), (2, 32), (3, 200)])
def test_distances_fall_into_irpes_buckets(size):
    bucket = distance_bucket(size)
    for y in range(1 - size[0], size[0]):
        for x in range(1 - size[1], size[1]):
            distance = round(math.sqrt(y * y + x * x))
            if distance > 20:
                distance = min(40, round(20 + 20 * math.log(distance / 20) / math.log(8)))
            assert bucket[y + size[0] - 1, x + size[1] - 1] == 40 + distance
    assert 40 <= bucket.min() <= bucket.max() < BUCKETS


def test_partial_attention_is_softmax_over_pixels_with_the_distance_bias():
    torch.manual_seed(0)
    layer = PartialAttention(16, 4, num_heads=2).double()
    nn.init.normal_(layer.bias.table)
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    pixels = [(i, j) for i in range(3) for j in range(5)]
    tokens = F.layer_norm(x[:, 4:].permute(0, 2, 3, 1), (12,), layer.norm.weight, layer.norm.bias, 1e-6).flatten(1, 2)
    q, k, v = layer.qkv(tokens).view(2, 15, 3, 2, 6).permute(2, 0, 3, 1, 4)
    offset = [[40 + round(math.dist(a, b)) for b in pixels] for a in pixels]
    logits = q @ k.transpose(2, 3) * 6**-0.5 + layer.bias.table[:, torch.tensor(offset)]
    out = layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)).transpose(1, 2).view(2, 12, 3, 5)
    expected = torch.cat((F.conv2d(x[:, :4], layer.conv.weight, padding=1), out), 1)
    torch.testing.assert_close(layer(x), expected)


def test_distance_bias_learns_and_follows_its_table_in_evaluation():
    bias = DistanceBias(2).eval()
    with torch.no_grad():
        assert not bias((3, 4)).any()
        bias.table.fill_(1)
        assert bias((3, 4)).eq(1).all()
    bias((3, 4)).sum().backward()
    assert bias.table.grad.sum() == 2 * 12 * 12


def test_dropouts_act_in_training_only():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 4, 4)
    for drops in (dict(attn_drop=0.5), dict(proj_drop=0.5)):
        layer = PartialAttention(8, 2, 1, **drops)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        torch.testing.assert_close(layer(x), layer(x))


def test_one_image_trains_with_the_running_statistics_of_the_gates():
    """The published code raises: batch norm sees one value a channel."""
    layer = PartialChannelAttention(8, 2)
    before = layer.gate_norm.running_mean.clone()
    out = layer(torch.randn(1, 8, 4, 4))
    out.sum().backward()
    assert torch.equal(layer.gate_norm.running_mean, before)
    assert layer.gate.weight.grad.isfinite().all()
    layer(torch.randn(2, 8, 4, 4))
    assert not torch.equal(layer.gate_norm.running_mean, before)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_heads must divide the 12 attended channels; got 5"):
        PartialAttention(16, 4, 5)
    with pytest.raises(ValueError, match="dim must be a power of two for a dynamic partial convolution; got 24"):
        DynamicPartialConv(24)


def test_fresh_gates_are_the_same_in_half_precision():
    torch.manual_seed(0)
    gate = DynamicPartialConv(2**8).gate
    assert 0 < (gate > 0).sum() < 8
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(gate.to(dtype) > 0, gate > 0)


@pytest.mark.parametrize("on", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_gates_make_a_grouped_convolution_in_training_and_a_partial_one_in_evaluation(on):
    torch.manual_seed(0)
    layer = DynamicPartialConv(8)
    with torch.no_grad():
        layer.gate.fill_(-0.3)
        layer.gate[list(on)] = 0.3
    groups = 2 ** len(on)
    mask = group_mask((layer.gate > 0).float())[:, :, 0, 0]
    assert mask.sum(0).eq(8 // groups).all()  # every channel reads as many as a grouped convolution's would
    assert mask.sum(1).eq(8 // groups).all()
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.conv.weight * mask[:, :, None, None], padding=1))
    layer(x).square().sum().backward()
    assert layer.gate.grad.abs().min() > 0
    live = 8 // groups
    partial = F.conv2d(x[:, :live], layer.conv.weight[:live, :live], padding=1)
    expected = torch.cat((partial, x[:, live:]), 1)
    torch.testing.assert_close(layer.eval()(x), expected)
    fused = FusedPartialConv(layer)
    torch.testing.assert_close(fused(x), expected)
    assert fused.conv.weight.shape[:2] == (live, live)
    assert list(dict(fused.named_parameters())) == ["conv.weight"]


def test_the_leading_gates_on_make_neighbouring_channels_a_group():
    mask = group_mask(torch.tensor([1.0, 1.0, 0.0]))[:, :, 0, 0]
    torch.testing.assert_close(mask, torch.block_diag(*[torch.ones(2, 2)] * 4))


def test_neighbours_with_a_bias_keep_it():
    """They have one where their own norm was folded before."""
    torch.manual_seed(0)
    mixer, gate = PartialChannelAttention(16, 4).double(), SpatialGate(16).double()
    expand, project = (nn.Conv2d(16, 16, 1).double() for _ in range(2))
    x = torch.randn(3, 16, 5, 7, dtype=torch.float64)
    for _ in range(3):
        gate(project(expand(mixer(x))))
    mixer.eval(), gate.eval()
    with torch.no_grad():
        expected = gate(project(expand(mixer(x))))
        mixer, expand = fold_channel_attention(mixer, expand)
        project, gate = fold_spatial_gate(gate, project)
        torch.testing.assert_close(gate(project(expand(mixer(x)))), expected)
