"""Tests for every registered model of every family: timm's contract, any size, gradients, compile, export."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import timm
import torch
from networks import (
    BLOCKS,
    FAMILIES,
    LEADERS,
    MODELS,
    few_blocks,
    image,
    leaders_of,
    mostly,
    one_block_a_stage,
    shallow,
    size,
    skeleton,
    variants_too,
)
from timm.models import is_model_in_modules
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from hybridzoo.checkpoints import cards
from hybridzoo.layers.inference import FusedError


@pytest.fixture(scope="module")
def shared():
    """A model is built once per test module run; tests that change it take a copy."""
    cache = {}

    def get(name: str) -> torch.nn.Module:
        if name not in cache:
            cache.clear()  # tests are ordered by model: one at a time in memory
            torch.manual_seed(0)
            cache[name] = timm.create_model(name, num_classes=7, **size(name)).eval()
        return cache[name]

    return get


@pytest.fixture(scope="module")
def meta():
    """A model with one block per stage on the meta device, for tests of names and shapes."""

    @functools.lru_cache(maxsize=1)  # tests are ordered by model
    def get(name: str) -> torch.nn.Module:
        return skeleton(name, **one_block_a_stage(name)).to("meta").eval()  # buffers from NumPy too

    return get


def test_there_are_models():
    assert len(MODELS) >= 5
    assert not is_model_in_modules("biformer_tiny", ["vision_transformer"])


@pytest.mark.parametrize("name", FAMILIES)
def test_small_networks_have_every_kind_of_layer(name):
    kinds = {type(module) for module in skeleton(name, **few_blocks(name)).modules()}
    assert {type(module) for module in shallow(name).modules()} == kinds


@pytest.mark.filterwarnings("ignore:std_mean")  # of PyTorch, about no images
@pytest.mark.parametrize("name", variants_too())
def test_any_size_forward(shared, name):
    for pixels in ((32, 32), (33, 57), (130, 97)) if name in LEADERS else ((33, 57),):
        with torch.no_grad():
            logits = shared(name)(image(*pixels))
        assert logits.shape == (2, 7)
        assert logits.isfinite().all(), pixels
    with torch.no_grad():
        assert shared(name)(image(batch=0)).shape == (0, 7)


@pytest.mark.parametrize("name", variants_too())
def test_backward_reaches_every_parameter(shared, name):
    model = copy.deepcopy(shared(name)).train()
    model(image()).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} has no gradient"
        assert parameter.grad.isfinite().all(), f"{key}"


@pytest.mark.parametrize("name", MODELS)
def test_default_cfg_is_complete(meta, name):
    model = meta(name)
    cfg = model.default_cfg
    assert {"url", "num_classes", "input_size", "pool_size", "mean", "std", "first_conv", "classifier"} <= cfg.keys()
    state = model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    assert f"{cfg['classifier']}.weight" in state
    assert model.num_classes == cfg["num_classes"]
    pool_size = tuple(-(-pixels // model.feature_info[-1]["reduction"]) for pixels in cfg["input_size"][1:])
    assert tuple(cfg["pool_size"]) == pool_size
    if name in LEADERS:
        with torch.no_grad(), torch.device("meta"):
            *_, last = model.forward_intermediates(torch.empty(1, *cfg["input_size"]), intermediates_only=True)
            assert last.shape[-2:] == pool_size


@pytest.mark.parametrize("name", variants_too([*FAMILIES, "agent_deit_tiny"]))  # a host with a head of its own
def test_classifier_can_be_reset_or_removed(shared, name):
    model = copy.deepcopy(shared(name))
    with torch.no_grad():
        features = model.forward_features(image())
        assert features.shape[1 if features.ndim == 4 else 2] == model.num_features  # a map, or tokens
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert isinstance(model.get_classifier(), torch.nn.Linear)
        model.reset_classifier(11)
        assert model(image()).shape == (2, 11)
        model.reset_classifier(0)
        torch.testing.assert_close(model(image()), pooled)
        model.reset_classifier(0, "")
        assert model(image()).shape == features.shape
        headless = timm.create_model(name, num_classes=0, global_pool="max", **size(name))
        assert headless.eval()(image()).shape == (2, headless.head_hidden_size)


@pytest.mark.parametrize("name", MODELS)
def test_the_card_lists_the_feature_maps(meta, name):
    """`hybridzoo info` prints them without building the network."""
    card = next(card for card in cards(name) if card.model == name)
    info = meta(name).feature_info
    assert card.channels == tuple(level["num_chs"] for level in info)
    assert card.strides == tuple(level["reduction"] for level in info)


@pytest.mark.parametrize("name", variants_too())
def test_the_card_has_the_number_of_parameters(name):
    """For every tag, because some set arguments.

    That the other sizes have as many as their published files, and that a card states it, is for the families' tests of
    published state dicts and `test_cards`.
    """
    for card in {str(card.model_args): card for card in cards(name) if card.model == name}.values():
        assert sum(p.numel() for p in skeleton(card.name).parameters()) == card.params, card.name


# Hosts differ in their maps too, isotropic nets in their strides.
@pytest.mark.parametrize(
    "name", variants_too({*FAMILIES, "dinat_isotropic_small", *(n for n in LEADERS if n.startswith("agent_"))})
)
def test_intermediates_are_the_features(shared, name):
    model = shared(name)
    info = model.feature_info
    with torch.no_grad():
        final, maps = model.forward_intermediates(image(97, 66))
        torch.testing.assert_close(final, model.forward_features(image(97, 66)))
        assert len(maps) == len(info)
        for feature, entry in zip(maps, info, strict=True):
            assert feature.shape[1] == entry["num_chs"]
            for side, pixels in zip(feature.shape[2:], (97, 66), strict=True):
                assert side in (pixels // entry["reduction"], -(-pixels // entry["reduction"]))
        (second,) = model.forward_intermediates(image(97, 66), indices=[1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(second, maps[1])
        (last,) = model.forward_intermediates(image(97, 66), indices=1, norm=True, intermediates_only=True)
        if final.ndim == 3:  # tokens, the class token first
            final = final[:, 1:].mT.reshape(last.shape)
        torch.testing.assert_close(last, final)
        with pytest.raises(ValueError, match="output_fmt must be 'NCHW'"):
            model.forward_intermediates(image(), output_fmt="NLC")
        dense = timm.create_model(name, features_only=True, out_indices=(0, 2), **size(name))
        dense.model.load_state_dict(model.state_dict(), strict=False)  # it lacks the head and final norm
        for got, index in zip(dense.eval()(image(97, 66)), (0, 2), strict=True):
            torch.testing.assert_close(got, maps[index])
        assert dense.feature_info.channels() == [info[0]["num_chs"], info[2]["num_chs"]]
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([0], prune_norm=True)
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters()) / 2


@pytest.mark.parametrize("name", mostly(sorted(BLOCKS), ["overlock_xtiny", "partialnet_t0", "ravlt_tiny"]))
def test_timms_other_feature_extractors_say_how_their_maps_lie(name):
    """They read the stages' results, which in half of the families are NHWC."""

    def extractor(**arguments):
        torch.manual_seed(0)
        return timm.create_model(name, features_only=True, **few_blocks(name), **arguments).eval()

    if name in ("overlock_xtiny", "agent_deit_tiny", "inline_deit_tiny"):
        with pytest.raises(ValueError, match=f"feature_cls='hook': the maps of {name} are not the results of its st"):
            extractor(feature_cls="hook")
        return
    with torch.no_grad():
        expected = extractor()(image())
        for kind, given in dict(hook={}, fx=dict(out_indices=(0, 1)), list={}, dict=dict(out_indices=(0, 1))).items():
            model = extractor(feature_cls=kind, **given)
            found = model(image())
            found = list(found.values()) if kind == "dict" else found
            assert len(found) == (2 if given else len(expected))
            for got, wanted in zip(found, expected, strict=False):
                torch.testing.assert_close(got.permute(0, 3, 1, 2) if model.output_fmt == "NHWC" else got, wanted)
    if name == "partialnet_t0":
        with pytest.raises(ValueError, match="feature_cls='hook': the maps of partialnet_t0 are not"):
            extractor(feature_cls="hook", feature_norms=True)


@pytest.mark.parametrize("name", variants_too())
def test_layer_decay_orders_the_parameters_from_image_to_logits(name):
    model = skeleton(name)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.9
    )
    scale = {}
    names = {id(p): key for key, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            scale[names[id(p)]] = group["lr_scale"]
            assert (group["weight_decay"] == 0) == (p.ndim <= 1 or names[id(p)] in model.no_weight_decay())
    assert len(scale) == len(names)
    assert scale[f"{model.default_cfg['classifier']}.weight"] == 1.0
    assert scale[f"{model.default_cfg['first_conv']}.weight"] == min(scale.values())
    ordered = [scale[key] for key in names.values() if ".blocks." in key]
    assert ordered == sorted(ordered)
    assert len(set(ordered)) == sum(len(stage.blocks) for stage in model.stages)


# All stages recompute by the same lines; here are those with several maps, with tokens, with windows and with neither.
@pytest.mark.parametrize("name", leaders_of(["biformer_stl", "efficientvit_msra_m0", "fastervit_0", "overlock_xtiny"]))
def test_grad_checkpointing_changes_nothing(shared, name):
    plain, checkpointed = copy.deepcopy(shared(name)), copy.deepcopy(shared(name))
    checkpointed.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in checkpointed.stages)
    kept = {}
    for key, model in (("plain", plain), ("checkpointed", checkpointed)):
        kept[key] = 0

        def pack(t, key=key):
            kept[key] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(image()).square().mean()
        loss.backward()
    assert kept["checkpointed"] < 0.6 * kept["plain"]
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", leaders_of(FAMILIES))
def test_bfloat16_autocast_channels_last_and_determinism(shared, name):
    model = copy.deepcopy(shared(name))
    with torch.no_grad():
        expected = model(image())
        last = model.to(memory_format=torch.channels_last)(image().contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    model.train()
    runs = []
    for _ in range(2):
        model.zero_grad()
        trained = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = trained(image()).square().mean()
        loss.backward()
        runs.append([p.grad for p in trained.parameters()])
    assert all(g.isfinite().all() for g in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", leaders_of(FAMILIES))
def test_drop_path_and_in_chans(name):
    model = timm.create_model(name, in_chans=1, num_classes=3, drop_path_rate=0.5, drop_rate=0.2, **size(name)).train()
    first, second = model(image()[:, :1]), model(image()[:, :1])
    assert first.shape == (2, 3)
    assert not torch.equal(first, second)
    model.eval()
    torch.testing.assert_close(model(image()[:, :1]), model(image()[:, :1]))


@pytest.mark.parametrize("name", leaders_of(["biformer_stl"]))  # an operator with a gradient of its own, and routes
def test_compiles_as_one_graph_forward_and_backward(name):
    """The operators' own tests compile each of them, most in both directions."""
    torch._dynamo.reset()
    model = shallow(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(image())
    torch.testing.assert_close(out, model(image()))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", mostly(sorted(BLOCKS - {"biformer_stl"}), FAMILIES))
def test_other_blocks_compile_as_one_graph(name):
    """Only the forward pass; the gradients of plain operators are PyTorch's."""
    torch._dynamo.reset()
    model = shallow(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(image()), model(image()))


EXPORTED = {"efficientvit_mit_b0", "partialnet_t0"}  # for any size too, see tests/train/test_exports.py


def exported(model):
    return torch.export.export(model, (image(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"biformer_stl"} - EXPORTED))
def test_exports_with_a_dynamic_batch(name):
    model = shallow(name)
    with torch.no_grad():
        torch.testing.assert_close(exported(model).module()(image(batch=3)), model(image(batch=3)))


@pytest.mark.parametrize("name", leaders_of(["biformer_stl"]))  # routes that are chosen
def test_exports_with_a_dynamic_batch_and_onnx_agrees(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = shallow(name)
    program = exported(model)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image(batch=3)), model(image(batch=3)))
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: image(batch=5).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), model(image(batch=5)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", leaders_of(FAMILIES))
def test_a_fused_network_computes_the_same(name):
    """In float64 by other forms, in float32 by other kernels too, at the size of its tables and at another."""
    model = shallow(name)
    with torch.no_grad():
        for parameter in model.parameters():  # so that branches that start at zero count, and tables
            parameter.normal_(0.5 if parameter.ndim == 1 else 0, 0.1)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        plain = copy.deepcopy(model).to(dtype)
        fused = copy.deepcopy(plain).fuse((64, 96))
        with torch.no_grad():
            for x in (image(batch=3).to(dtype), image(75, 50).to(dtype)):
                expected = plain(x)
                assert (fused(x) - expected).abs().max() < tolerance * expected.std()
        with torch.no_grad():
            assert (fused.fuse((75, 50))(x) - expected).abs().max() < tolerance * expected.std()
            assert fused(x[:0]).shape == (0, 7)
    with torch.no_grad():
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            torch.testing.assert_close(twin(x), fused(x))
    assert not list(fused.parameters())
    for optimizer in (lambda: torch.optim.SGD(fused.parameters(), 0.1), lambda: create_optimizer_v2(fused, "adamw")):
        with pytest.raises(ValueError, match="empty parameter list"):
            optimizer()
    with pytest.raises(FusedError, match="train"):
        fused.train()
    with pytest.raises(FusedError, match="load_state_dict"):
        fused.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", mostly(sorted(BLOCKS), FAMILIES))
def test_a_dense_network_can_be_fused(name):
    """Without its head, as detectors and segmentors have it."""
    dense = timm.create_model(name, features_only=True, out_indices=(0, 1, 2), **few_blocks(name)).eval()
    with torch.no_grad():
        expected = dense(image())
        dense.model.fuse((64, 96))
        for got, wanted in zip(dense(image()), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.std().item())
    with pytest.raises(FusedError, match="train"):
        dense.train()
