"""Cascaded group attention against its definition, and its bias tables at other windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.layers import CascadedGroupAttention
from hybridzoo.layers.cascaded_group_attention import AbsoluteOffsetBias


def layer_of(window: int = 4) -> CascadedGroupAttention:
    torch.manual_seed(0)
    layer = CascadedGroupAttention(24, num_heads=3, window=window, kernel_sizes=(5, 3, 3, 3), key_dim=4).double().eval()
    torch.nn.init.normal_(layer.bias.table)
    return layer


def one_window(layer: CascadedGroupAttention, x: torch.Tensor) -> torch.Tensor:
    """The paper's equations for `(dim, h, w)`, token by token."""
    _, height, width = x.shape
    shares, outs = x.split(8), []
    for head, (qkv, depthwise) in enumerate(zip(layer.qkvs, layer.depthwise, strict=True)):
        share = shares[head] + (outs[-1] if outs else 0)
        q, k, v = qkv(share[None])[0].split((4, 4, 8))
        q = depthwise(q[None])[0]
        out = torch.empty_like(v)
        for y in range(height):
            for z in range(width):
                logits = torch.stack(
                    [
                        q[:, y, z] @ k[:, i, j] * 0.5 + layer.bias.table[head, abs(y - i) * layer.window + abs(z - j)]
                        for i in range(height)
                        for j in range(width)
                    ]
                )
                out[:, y, z] = v.flatten(1) @ logits.softmax(0)
        outs.append(out)
    return layer.proj(F.relu(torch.cat(outs))[None])[0]


@pytest.mark.parametrize("size", [(4, 4), (2, 4), (3, 1)])
def test_a_map_within_the_window_is_one_window(size):
    layer = layer_of()
    x = torch.randn(2, 24, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.stack([one_window(layer, image) for image in x]))


def test_a_larger_map_is_padded_with_zeros_that_are_attended_to():
    layer = layer_of()
    x = torch.randn(1, 24, 3, 6, dtype=torch.float64)
    padded = F.pad(x, (0, 2, 0, 1))
    with torch.no_grad():
        expected = torch.cat([one_window(layer, padded[0, :, :, i : i + 4]) for i in (0, 4)], dim=2)
        torch.testing.assert_close(layer(x)[0], expected[:, :3, :6])


def test_the_bias_follows_the_weights_and_works_on_smaller_maps():
    bias = AbsoluteOffsetBias(2, 7).eval()
    torch.nn.init.normal_(bias.table)
    with torch.no_grad():
        whole = bias(7, 7).unflatten(2, (7, 7)).unflatten(1, (7, 7))
        torch.testing.assert_close(bias(3, 5), whole[:, :3, :5, :3, :5].reshape(2, 15, 15))
        bias.load_state_dict({"table": torch.ones(2, 49)})
        assert (bias(7, 7) == 1).all()


def test_tables_of_another_window_are_resized_while_loading():
    small, large = AbsoluteOffsetBias(2, 4), AbsoluteOffsetBias(2, 7)
    torch.nn.init.normal_(small.table)
    large.load_state_dict(small.state_dict())
    square = small.table.detach().reshape(1, 2, 4, 4)
    expected = F.interpolate(square, (7, 7), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(large.table.detach(), expected.reshape(2, 49))


def test_gradients_reach_every_parameter_in_windows():
    layer = layer_of().train()
    layer(torch.randn(2, 24, 6, 9, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("wrong", [dict(dim=25), dict(kernel_sizes=(3,)), dict(window=0)])
def test_bad_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CascadedGroupAttention(**(dict(dim=24, num_heads=3, window=4) | wrong))
