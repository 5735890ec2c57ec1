"""OverLoCK equals the published code, with branches and merged, as classifier and as dense network."""

from __future__ import annotations

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of

import hybridzoo  # noqa: F401
from hybridzoo.backbones.overlock import FocusBlock, OverLoCK, OverLoCKConfig, RepConvBlock
from hybridzoo.checkpoints import cards, convert
from hybridzoo.checkpoints.keymaps import publish
from hybridzoo.checkpoints.pretrained import Weights
from hybridzoo.layers import DilatedReparamConv

FIXTURES = goldens.structures("overlock", "overlock_t", "overlock_xt", "overlock_xt_200x264")
MANIFESTS = goldens.names("overlock", numeric=False)
SIZES = {"xt": "xtiny", "t": "tiny", "s": "small", "b": "base"}
ROW = dict(depths=(1, 1, 1, 1), focus_depths=(2, 1), dims=(16, 32, 64, 96), num_heads=(4, 6))
SHALLOW = dict(num_classes=7, **ROW)


def name_of(fixture: str) -> str:
    return f"overlock_{SIZES[fixture.split('_')[1]]}"


def model_of(fixture: str) -> torch.nn.Module:
    arguments = dict(merged="_reparam" in fixture)
    for short, form in (("_det_", "detection"), ("_seg_", "segmentation")):
        if short in fixture:
            return timm.create_model(name_of(fixture), feature_norms=form, num_classes=0, global_pool="", **arguments)
    return timm.create_model(name_of(fixture), aux_head=True, **arguments)


def trained(**arguments) -> torch.nn.Module:
    """With weights and statistics as training leaves them."""
    torch.manual_seed(0)
    model = timm.create_model("overlock_xtiny", **SHALLOW | arguments).double().eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    meta = goldens.manifest("overlock", fixture)
    with torch.device("meta"):
        model = model_of(fixture)
        state = {key: torch.empty(shape) for key, shape, _ in meta["state_dict"]}
        converted = convert(state, name_of(fixture))
        back = publish(converted, name_of(fixture))
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    assert {key: list(value.shape) for key, value in back.items()} == {k: shape for k, shape, _ in meta["state_dict"]}
    assert all(value is converted[key] for key, value in convert(converted, name_of(fixture)).items())


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_the_published_network(fixture):
    model = goldens.network(model_of, fixture)
    model.load_state_dict(convert(goldens.published_state("overlock", fixture), name_of(fixture)))
    data = goldens.numbers("overlock", fixture)
    image = goldens.image(goldens.manifest("overlock", fixture)["input_shape"])
    contexts = []
    model.stages[2].register_forward_hook(lambda module, args, state: contexts.append(state[4]))
    with torch.no_grad():
        final, maps = model.forward_intermediates(image)
        goldens.assert_maps(maps, data)
        if data["logits"].numel():
            goldens.assert_close(model.forward_head(final), data["logits"])
            goldens.assert_close(goldens.sample(contexts[0]), data["ctx_sample"], std=data["ctx_std"].item())
            goldens.assert_close(model.aux_head(contexts[0]), data["aux_logits"])


@pytest.mark.parametrize("case", ["8x9_c32_h16_k7_g4", "first_1x7x7_c32_h8_k7_g4", "resize_1x5x7_c32_h16_k7_g4"])
def test_a_focus_block_has_the_published_values_and_gradients(case):
    name = f"contmix_block_{case if case[0].isalpha() else '1x' + case}"
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    first = meta["is_first"]
    block = FocusBlock(meta["dim"], meta["context_channels"], meta["groups"], meta["kernel_size"], first, False, 0.0)
    names = _load(block, data, "sub_blocks3")
    x, h, r = (data[key].requires_grad_() for key in ("x", "h_x", "h_x" if first else "h_r"))
    out = block((x, h, r, r, r))[:2]
    goldens.assert_close(out[0], data["out_x"])
    goldens.assert_close(out[1], data["out_h"])
    (out[0] * data["grad_out_x"]).sum().add((out[1] * data["grad_out_h"]).sum()).backward()
    goldens.assert_close(x.grad, data["grad_x"])
    goldens.assert_close(h.grad, data["grad_h_x"])
    if not first:
        goldens.assert_close(r.grad, data["grad_h_r"])
    _assert_gradients(block, data, names)


def test_a_rep_conv_block_has_the_published_values_and_gradients():
    data = goldens.numbers("ops", "repconv_block_1x10x9_c16_k9_ls")
    block = RepConvBlock(16, 9, True, False, 0.0)
    names = _load(block, data, "blocks3")
    x = data["x"].requires_grad_()
    out = block(x)
    goldens.assert_close(out, data["out"])
    (out * data["grad_out"]).sum().backward()
    goldens.assert_close(x.grad, data["grad_x"])
    _assert_gradients(block, data, names)


def _load(block: torch.nn.Module, data: dict, prefix: str) -> dict[str, str]:
    """Fill a block by the key map of whole networks; our names -> published ones, of its parameters."""
    around = ["patch_embed1.0.weight", "blocks3.0.proj.1.origin_bn.weight"]  # of a network with branches
    names = [name for kind, _, name in (key.partition(".") for key in data) if kind in ("param", "buffer")]
    given = dict.fromkeys(around, data["x"]) | {
        f"{prefix}.0.{name}": data.get(f"param.{name}", data.get(f"buffer.{name}")) for name in names
    }
    inside = "stages.2.blocks.2." if prefix.startswith("sub") else "stages.2.blocks.0."
    converted = {k.removeprefix(inside): v for k, v in convert(given, "overlock_tiny").items() if k.startswith(inside)}
    block.double().eval()
    missing, unexpected = block.load_state_dict(converted, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    pointers = {data.get(f"param.{name}", data.get(f"buffer.{name}")).data_ptr(): name for name in names}
    return {key: pointers[value.data_ptr()] for key, value in converted.items()}


def _assert_gradients(block: torch.nn.Module, data: dict, names: dict[str, str]) -> None:
    for key, parameter in block.named_parameters():
        expected = data[f"grad.{names[key]}"].reshape(parameter.shape)
        # A bias that only shifts a row of scores has no gradient but rounding.
        goldens.assert_close(parameter.grad, expected, std=max(expected.std().item(), 1e-3))


def test_weights_of_either_form_load_into_both():
    model, image = trained(), torch.randn(2, 3, 64, 70, dtype=torch.float64)
    merged = timm.create_model("overlock_xtiny", merged=True, **SHALLOW).double().eval()
    branched = timm.create_model("overlock_xtiny", **SHALLOW).double().eval()
    merged.load_state_dict(model.state_dict())
    branched.load_state_dict(merged.state_dict())
    with torch.no_grad():
        expected = model(image)
        goldens.assert_close(merged(image), expected)
        goldens.assert_close(branched(image), expected)
    branched.train()(image).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in branched.parameters())


def test_folding_removes_branches_and_norms_of_large_kernels():
    model, image = trained(), torch.randn(2, 3, 64, 70, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)
        model.fuse()
        goldens.assert_close(model(image), expected)
    assert not [m for m in model.modules() if isinstance(m, DilatedReparamConv | torch.nn.BatchNorm2d)]


@pytest.mark.parametrize("form", ["in1k", "reparam_in1k"])
def test_a_published_file_fits_the_requested_network(form, tmp_path):
    """The auxiliary classifier of the file is used where there is one, and a merged file fits branches."""
    model = trained(aux_head=True, merged=form.startswith("reparam"))
    file = tmp_path / "overlock.pth"
    torch.save(publish(model.state_dict(), "overlock_xtiny"), file)
    cfg = dict(model.pretrained_cfg, num_classes=7)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def load(**arguments):
        family = lambda **more: OverLoCK(OverLoCKConfig(**ROW), **more)  # noqa: E731
        create = Weights(file, cfg, "", published=False).into(family, features_only=False)
        return create(**arguments).double().eval()

    with torch.no_grad():
        expected = model(image)
        for merged in (False, True):
            assert (load(num_classes=7, merged=merged)(image) - expected).abs().max() < 1e-4 * expected.std()
        context = model.stages[:3](model.stem(image))[4]
        loaded = load(num_classes=7, aux_head=True)
        torch.testing.assert_close(loaded.aux_head(context), model.aux_head(context), rtol=1e-4, atol=1e-4)
        other = load(num_classes=3, aux_head=True)
        assert other(image).shape == other.aux_head(context).shape == (1, 3)


def test_training_returns_auxiliary_logits_if_requested():
    model, image = timm.create_model("overlock_xtiny", aux_head=True, **SHALLOW), torch.randn(2, 3, 64, 64)
    main, aux = model.train()(image)
    assert main.shape == aux.shape == (2, 7)
    (main.sum() + 0.4 * aux.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(image).shape == (2, 7)
    model.reset_classifier(3)
    assert [t.shape for t in model.train()(image)] == [(2, 3), (2, 3)]
    model.reset_classifier(0)
    assert model(image).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("card", costs_of(cards("overlock_*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    assert_cost(card, abs=6e-4)


def test_stochastic_depth_grows_over_all_three_parts():
    model = timm.create_model("overlock_xtiny", drop_path_rate=0.1)
    blocks = [block for block in model.modules() if isinstance(block, RepConvBlock | FocusBlock)]
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0.1 * i / 16 for i in range(17)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 1, 1)), r"depths must be 4 positive numbers; got \(1, 1, 1\)"),
        (dict(num_heads=(8, 0)), r"num_heads must be 2 positive numbers; got \(8, 0\)"),
        (dict(num_heads=(7, 12)), "dim must be a multiple of 2 \\* num_heads; got dim=256, num_heads=7"),
        (dict(feature_norms="yes"), "feature_norms must be '', 'segmentation' or 'detection'; got 'yes'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("overlock_xtiny", **arguments)
