"""Convolutional bricks against timm's blocks of the same kind, and what timm's do not offer."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual
from torch import nn

from hybridzoo.layers import ConvNormAct, FusedMBConv, MBConv, PoolShortcut
from hybridzoo.layers.inference import fuse

TIMM_TO_OURS = {
    MBConv: {
        "conv_pw": "expand.conv",
        "bn1": "expand.norm",
        "conv_dw": "depthwise.conv",
        "bn2": "depthwise.norm",
        "conv_pwl": "project.conv",
        "bn3": "project.norm",
    },
    FusedMBConv: {
        "conv_exp": "expand.conv",
        "bn1": "expand.norm",
        "conv_pwl": "project.conv",
        "bn2": "project.norm",
    },
}


def randomize(module: nn.Module) -> nn.Module:
    """Weights and running statistics that a mistake cannot hide behind."""
    torch.manual_seed(0)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.1
    return module.double()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("se_dim", [0, 3])
@pytest.mark.parametrize(("ours", "theirs"), [(MBConv, InvertedResidual), (FusedMBConv, EdgeResidual)])
@pytest.mark.parametrize("training", [False, True])
def test_equals_timms_block(ours, theirs, stride, se_dim, training):
    out_dim = 8 if stride == 1 else 12
    se = partial(SqueezeExcite, rd_channels=se_dim, act_layer=nn.SiLU) if se_dim else None
    timm_se = (lambda dim, act_layer, **dd: se(dim, **dd)) if se else None
    reference = randomize(theirs(8, out_dim, stride=stride, exp_ratio=2.0, act_layer=nn.SiLU, se_layer=timm_se))
    shortcut = nn.Identity() if stride == 1 else None
    block = ours(8, out_dim, stride, hidden_dim=16, se_dim=se_dim, act_layer=nn.SiLU, shortcut=shortcut).double()
    names = TIMM_TO_OURS[ours]
    state = {}
    for key, value in reference.state_dict().items():
        first, rest = key.split(".", 1)
        state[f"{names.get(first, first)}.{rest}"] = value
    block.load_state_dict(state)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(block.train(training)(x), reference.train(training)(x))


@pytest.mark.parametrize("norms", list(itertools.product((False, True), repeat=3)))
def test_a_convolution_has_a_norm_or_a_bias_and_folding_changes_nothing(norms):
    without = [name for name, norm in zip(("expand", "depthwise", "project"), norms, strict=True) if not norm]
    block = MBConv(8, 8, hidden_dim=16, without_norm=without, pre_norm=True, se_dim=2, shortcut=nn.Identity())
    block = randomize(block).eval()
    for brick, norm in zip((block.expand, block.depthwise, block.project), norms, strict=True):
        assert isinstance(brick.norm, nn.BatchNorm2d) == norm
        assert (brick.conv.bias is None) == norm
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    expected = block(x)
    fuse(block)
    fuse(block)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())


def test_same_padding_puts_the_odd_zero_at_the_bottom_and_right():
    brick = ConvNormAct(3, 5, 3, 2, padding="same", norm_layer=None)
    x = torch.randn(1, 3, 8, 6)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), brick.conv.weight, brick.conv.bias, stride=2)
    torch.testing.assert_close(brick(x), expected)
    block = MBConv(3, 5, 2, hidden_dim=4, padding="same", shortcut=PoolShortcut(3, 5, 2))
    assert block(torch.randn(2, 3, 9, 7)).shape == (2, 5, 5, 4)
    symmetric = MBConv(3, 5, 2, hidden_dim=4, shortcut=PoolShortcut(3, 5, 2))
    symmetric.load_state_dict(block.state_dict())
    assert not torch.allclose(symmetric.eval()(x), block.eval()(x))


def test_the_pooled_shortcut_averages_only_real_pixels():
    x = torch.arange(15.0).view(1, 1, 3, 5)
    expected = torch.tensor([[[[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]]])
    torch.testing.assert_close(PoolShortcut(1, 1, 2)(x), expected)
    assert isinstance(PoolShortcut(4, 4).project, nn.Identity)
    assert PoolShortcut(4, 6).project.conv.bias is not None
    forced = PoolShortcut(4, 4, 2, norm_layer=nn.BatchNorm2d, project=True)
    assert forced.project.conv.bias is None


def test_drop_path_drops_the_branch_only():
    torch.manual_seed(0)
    block = FusedMBConv(4, 4, hidden_dim=8, shortcut=nn.Identity(), drop_path=0.5)
    x = torch.randn(64, 4, 2, 2)
    kept = (block(x) - x).abs().amax((1, 2, 3)) > 0
    assert 16 < kept.sum() < 48


@pytest.mark.parametrize("block", [MBConv, FusedMBConv])
def test_bad_arguments_are_named(block):
    with pytest.raises(
        ValueError, match="shortcut: the identity needs stride 1 and equal widths; got stride 2, 4 -> 4"
    ):
        block(4, 4, 2, hidden_dim=8, shortcut=nn.Identity())
    with pytest.raises(
        ValueError, match="shortcut: the identity needs stride 1 and equal widths; got stride 1, 4 -> 8"
    ):
        block(4, 8, hidden_dim=8, shortcut=nn.Identity())
    with pytest.raises(ValueError, match=r"drop_path must be 0 in a block without a shortcut; got 0\.1"):
        block(4, 4, hidden_dim=8, drop_path=0.1)
    with pytest.raises(ValueError, match="stride must be 1 or 2; got 3"):
        PoolShortcut(4, 4, 3)
