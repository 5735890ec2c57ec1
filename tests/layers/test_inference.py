"""Fusing changes how a network computes, never what; and it is for inference only."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import Counter

import pytest
import timm
import torch
from networks import few_blocks, shallow
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import hybridzoo  # noqa: F401
from hybridzoo.layers import ConvNormAct, FusedMBConv, MBConv, Residual
from hybridzoo.layers.inference import FusedError, fuse
from hybridzoo.layers.inference.fusing import Fixed
from hybridzoo.layers.inference.norms import FixedNorm, fuse_norm_layer_eval
from hybridzoo.layers.inference.packed import CONVOLUTION, PackedConv


def randomised(module: nn.Module) -> nn.Module:
    """In float64 and evaluation, with statistics and weights that a fold could get wrong."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return module.double().eval()


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", [None, "same"])
def test_a_norm_is_folded_into_the_convolution_before_it(groups, bias, padding):
    layer = randomised(ConvNormAct(8, 16, 3, 2, groups=groups, bias=bias, padding=padding, act_layer=nn.ReLU))
    x = torch.randn(2, 8, 9, 12, dtype=torch.float64)
    expected = layer(x)
    fuse(layer)
    assert isinstance(layer.norm, nn.Identity)
    torch.testing.assert_close(layer(x), expected)
    assert layer.conv.weight.dtype == torch.float64
    fuse(layer)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_norm_is_folded_into_the_layer_after_it(affine, bias, kind):
    norm, layer, x = (
        (nn.BatchNorm1d(6), nn.Linear(6, 4, bias=bias), torch.randn(5, 6))
        if kind == "linear"
        else (nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, bias=bias), torch.randn(5, 6, 3, 2))
    )
    norm, layer = randomised(nn.Sequential(norm, layer))
    if not affine:
        norm.affine, norm.weight, norm.bias = False, None, None
    x = x.double()
    torch.testing.assert_close(fuse_norm_layer_eval(norm, layer)(x), layer(norm(x)))


def test_fuse_folds_all_norms_and_switches_to_evaluation():
    blocks = nn.Sequential(
        MBConv(8, 8, hidden_dim=24, se_dim=4, pre_norm=True, shortcut=nn.Identity()),
        Residual(FusedMBConv(8, 8, hidden_dim=16)),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),  # nobody's to fold
    )
    model = randomised(blocks)
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    expected = model(x)
    folded = copy.deepcopy(model).train()
    fuse(folded)
    assert not folded.training
    torch.testing.assert_close(folded(x), expected)
    assert sum(isinstance(m, FixedNorm) for m in folded.modules()) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 7


def test_dense_models_and_wrapped_models_can_be_folded():
    dense = randomised(timm.create_model("efficientvit_mit_b0", features_only=True, depths=(1, 1, 1, 1)))
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = dense(x)
    fuse(dense)
    for got, wanted in zip(dense(x), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in dense.modules())


def test_a_folded_model_can_be_exported():
    model = timm.create_model("efficientvit_mit_b0", depths=(1, 1, 1, 1), num_classes=3).fuse()
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", ["efficientvit_msra_m0", "efficientvit_mit_b0", "patnet_t0", "ascan_tiny"])
@pytest.mark.parametrize("folded", [False, True])
def test_convolution_heavy_families_keep_channels_last(name, folded):
    """Whichever way the image comes: on a CPU convolutions are up to twice as fast so."""
    model = timm.create_model(name, depths=(1,) * (3 if "msra" in name else 4)).eval()
    with torch.no_grad():
        maps = (model.fuse() if folded else model).forward_intermediates(torch.randn(2, 3, 128, 160))[1]
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in maps)
    assert not any(level.is_contiguous() for level in maps)


def test_a_fused_network_is_for_inference_only():
    model = timm.create_model("efficientvit_msra_m0", depths=(1, 1, 1), num_classes=3)
    state = model.state_dict()
    assert model.fuse() is model
    assert model.fused
    assert not model.training
    model.eval()
    around = nn.Sequential(model)
    for refused in (
        model.train,
        around.train,
        lambda: model.load_state_dict(state),
        lambda: around.load_state_dict({f"0.{key}": value for key, value in state.items()}),
        lambda: model.reset_classifier(5),
        model.prune_intermediate_layers,
    ):
        with pytest.raises(FusedError, match="this network is fused, for inference only"):
            refused()
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert not model(torch.randn(1, 3, 64, 64)).requires_grad


@pytest.mark.parametrize(
    "name", ["biformer_stl", pytest.param("fastervit_0", marks=pytest.mark.exhaustive), "patnet_t0"]
)
def test_parts_of_a_fused_network_neither_train_nor_load(name):
    """Norms that nothing folds, dropout anywhere; weights that are packed, tables that are stored."""
    dropped = dict(attn_drop_rate=0.5, proj_drop_rate=0.5) if name == "patnet_t0" else {}
    rates = dict(drop_rate=0.5, drop_path_rate=0.5)
    model = timm.create_model(name, num_classes=7, **rates, **dropped, **few_blocks(name)).fuse((64, 64))
    x = torch.randn(2, 3, 64, 64)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    for child in model.children():
        child.train()
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for part in (model.stages, model.stages[0].blocks[0], copy.deepcopy(model).stages):
        with pytest.raises(FusedError, match="load_state_dict"):
            part.load_state_dict(part.state_dict())
    model.requires_grad_()
    assert not model(x).requires_grad
    with pytest.raises(RuntimeError, match="not needed when a module doesn't have any parameter"):
        nn.parallel.DistributedDataParallel(model, process_group=object())
    assert torch.equal(nn.DataParallel(model)(x).cpu(), expected)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Of convolutions, of norms in other layers, of a few images at a time, of attention in another form.
KINDS = ["efficientvit_mit_b0", "patnet_t0", "maxvit_tiny", "agent_swin_tiny"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_a_fused_network_copies_pickles_and_is_saved(name, way):
    model, x = shallow(name).fuse((64, 64)), torch.randn(1, 3, 64, 64)
    expected, twin = model(x), way(model)
    torch.testing.assert_close(twin(x), expected)
    assert not list(twin.parameters())
    for refused in (twin.train, lambda: twin.load_state_dict(twin.state_dict())):
        with pytest.raises(FusedError):
            refused()
    assert twin.fuse((64, 96)) is twin


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # the forms; no GPU is needed for them
def test_a_fused_network_can_be_moved_to_another_dtype_and_device(name, device):
    model, x = shallow(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        fused = copy.deepcopy(model).fuse((64, 64), device=device)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            plain, moved = model.to(dtype)(x.to(dtype)), copy.deepcopy(fused).to(dtype)(x.to(dtype))
            assert moved.dtype == dtype
            assert (moved - plain).abs().max() < 0.1 * expected.std()
        back = copy.deepcopy(fused).double().float()  # and its own kernels again
        torch.testing.assert_close(back(x), expected, rtol=1e-4, atol=1e-4)
        away = copy.deepcopy(fused).to("meta")
        assert away(x.to("meta")).shape == expected.shape
        with torch.autocast("cpu", torch.bfloat16):
            assert (fused(x).float() - expected).abs().max() < 0.1 * expected.std()
        if torch.cuda.is_available():
            there = copy.deepcopy(fused).cuda()
            torch.testing.assert_close(there(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(there.cpu()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(CONVOLUTION is None, reason="this PyTorch lacks oneDNN's convolution")
def test_convolutions_are_packed_for_the_shape_of_the_map():
    torch.manual_seed(0)
    block = nn.Sequential(ConvNormAct(16, 32, act_layer=nn.GELU)).eval()
    fused = copy.deepcopy(block)
    fuse(fused, device="cpu")
    (conv,) = fused
    assert isinstance(conv, PackedConv)
    for shape in [(2, 16, 7, 9), (1, 16, 14, 14), (3, 16, 14, 14), (2, 16, 7, 9)]:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(conv(x), block(x), rtol=1e-5, atol=1e-5)
        assert shape in conv.packed
        assert len(conv.packed) <= 2


def kinds(model: nn.Module) -> Counter:
    return Counter(type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("name", KINDS)
def test_fusing_twice_changes_only_what_was_left_out(name):
    x = torch.randn(2, 3, 64, 64)
    once = shallow(name).fuse((64, 64))
    expected, forms = once(x), kinds(once)
    assert kinds(once.fuse((64, 64))) == forms
    torch.testing.assert_close(once(x), expected)
    for first in (dict(portable=True), dict(device="cuda")):
        model = shallow(name).fuse((64, 64), **first)
        assert "PackedConv" not in kinds(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert kinds(model.fuse((64, 64), device="cpu")) == forms
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.double().float()(x), expected, rtol=1e-4, atol=1e-4)
        assert not list(model.parameters())
    with pytest.raises(FusedError, match="portable"):
        once.fuse(portable=True)


def test_fusing_twice_reads_images_of_as_many_channels():
    model = timm.create_model("biformer_tiny", in_chans=5, depths=(1, 1, 1, 1)).fuse(portable=True).fuse(64)
    assert model.fuse(96)(torch.randn(1, 5, 96, 96)).shape == (1, 1000)


@pytest.mark.parametrize("device", ["gpu", "", 1.5])
def test_an_unknown_type_of_device_is_named(device):
    with pytest.raises(ValueError, match=f"device must be .*; got {device!r}"):
        shallow("efficientvit_msra_m0").fuse(device=device)


class Adapted(nn.Module):
    """A layer with an adapter that is not merged, and with the layer's attributes, as peft wraps it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.adapter = layer, copy.deepcopy(layer)

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("layer", "adapter") else getattr(self.layer, name)

    def forward(self, x):
        return self.layer(x) + self.adapter(x)


class Halved(nn.GELU):
    def forward(self, x):
        return 0.5 * x


def replaced(model: nn.Module, kinds: tuple, make) -> None:
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if type(child) in kinds:
                setattr(module, key, make(child))


def weighted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d)]


def doubled(forward):
    return lambda x: 2 * forward(x)


CHANGES = {
    "pruned": lambda model: [prune.l1_unstructured(layer, "weight", amount=0.5) for layer in weighted(model)],
    "weight norm": lambda model: [weight_norm(layer) for layer in weighted(model)],
    "adapters": lambda model: replaced(model, (nn.Linear,), Adapted),
    "hooks": lambda model: [layer.register_forward_hook(lambda *given: given[-1] * 1.1) for layer in weighted(model)],
    "another forward": lambda model: [setattr(layer, "forward", doubled(layer.forward)) for layer in weighted(model)],
    "activations": lambda model: replaced(model, (nn.GELU, nn.ReLU, nn.Hardswish), lambda _: Halved()),
    "norms": lambda model: replaced(model, (nn.BatchNorm2d,), lambda norm: nn.GroupNorm(1, norm.num_features)),
    "synchronised norms": lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model),
    "norms of each batch": lambda model: replaced(
        model, (nn.BatchNorm2d,), lambda norm: nn.BatchNorm2d(norm.num_features, track_running_stats=False)
    ),
}


def usual(change: str, name: str) -> bool:
    """A rule that reads weights; a rule that folds norms."""
    return name in (("overlock_xtiny", "litv2_small") if "norms" in change else ("agent_cswin_tiny", "ravlt_tiny"))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param(change, name, marks=[] if name == "patnet_t0" or usual(change, name) else pytest.mark.exhaustive)
        for name in ["agent_cswin_tiny", "litv2_small", "overlock_xtiny", "patnet_t0", "ravlt_tiny"]
        for change in CHANGES
    ],
)
def test_what_others_changed_stays_in_effect(name, change):
    """They change what a layer computes and leave its class or its attributes, which a rule could believe."""
    model = shallow(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0, 0.1)
        CHANGES[change](model)
        model.double().eval()  # what it brought
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        expected = model(x)
        assert (model.fuse((64, 64))(x) - expected).abs().max() < 1e-9 * expected.std()
    assert not list(model.parameters())


@pytest.mark.parametrize("name", ["agent_deit_tiny", "litv2_small", "efficientvit_mit_b0"])
def test_a_fused_network_is_traced_for_any_batch(name):
    model, x, more = shallow(name).fuse((64, 64)), torch.randn(2, 3, 64, 64), torch.randn(9, 3, 64, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated
        expected = model(more)
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(more), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(x)).shape == (2, 7)
        torch.testing.assert_close(model(more), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["agent_deit_tiny", "maxvit_tiny"])
def test_a_fused_network_is_exported_for_any_batch(name):
    model, x, more = shallow(name).fuse((64, 64)), torch.randn(2, 3, 64, 64), torch.randn(9, 3, 64, 64)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(program(more), model(more), rtol=1e-4, atol=1e-4)


def test_stored_tables_do_not_bind_an_exported_program_to_their_size():
    model = shallow("partialnet_t0").fuse((64, 64))
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({2: auto, 3: auto},))
        for size in ((64, 64), (96, 160)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fastervit_0", "maxvit_tiny", "ravlt_tiny"])
def test_position_tables_are_computed_once_for_their_fixed_size(name):
    model = shallow(name).fuse((64, 96))
    tables = [module for module in model.modules() if isinstance(module, Fixed)]
    assert tables
    made = []
    for table in tables:
        assert table.results
        table.module.register_forward_hook(lambda *args: made.append(args))
    model(torch.randn(2, 3, 64, 96))
    model.double()(torch.randn(2, 3, 64, 96, dtype=torch.float64))
    assert not made
    model(torch.randn(1, 3, 160, 64, dtype=torch.float64))
    assert made
