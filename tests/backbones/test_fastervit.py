"""FasterViT against recorded outputs of the published models, at any size, and where they are broken."""

from __future__ import annotations

import copy

import goldens
import pytest
import timm
import torch
import torch.nn.functional as F
from networks import assert_cost, costs_of

from hybridzoo.backbones import fastervit
from hybridzoo.checkpoints import cards, convert
from hybridzoo.layers.inference.norms import FixedNorm

BROKEN = "faster_vit_0_any_res_224x448"  # two rows of four windows
FIXTURES = [n for n in goldens.structures("fastervit", "faster_vit_1_224") if n != BROKEN]
MANIFESTS = [n for n in goldens.names("fastervit", numeric=False) if n != BROKEN]
SHALLOW = dict(depths=(1, 1, 2, 1), dim=16, num_heads=(2, 4), num_classes=7)


def name_of(fixture: str) -> str:
    """`faster_vit_<n>_<pixels>`, `faster_vit_<n>_any_res_…` or `faster_vit_4_21k_<pixels>`."""
    number, *rest = fixture.removeprefix("faster_vit_").split("_")
    return f"fastervit_{number}" + (f".in21k_ft_in1k_{rest[1]}" if rest[0] == "21k" else "")


def maps_and_logits(model: torch.nn.Module, fixture: str):
    with torch.no_grad():
        final, maps = model.forward_intermediates(goldens.image(goldens.manifest("fastervit", fixture)["input_shape"]))
        return maps, model.forward_head(final)


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    manifest = goldens.manifest("fastervit", fixture)
    with torch.device("meta"):
        model = timm.create_model(name_of(fixture))
        state = {f"module.{key}": torch.empty(shape) for key, shape, _ in manifest["state_dict"]}
        converted = convert(state, name_of(fixture))
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == ours
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    assert convert(converted, name_of(fixture)).keys() == converted.keys()
    dropped = [key for key, *_ in manifest["state_dict"] if "relative_" in key or "tokenizer.pos_embed" in key]
    assert len(converted) + len(dropped) == len(state)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_the_published_network(fixture):
    """`any_res_256x320`: padded to a square grid of windows, the padding attended to."""
    model = goldens.network(timm.create_model, name_of(fixture))
    model.load_state_dict(convert(goldens.published_state("fastervit", fixture), name_of(fixture)))
    goldens.assert_outputs(model, "fastervit", fixture)


def test_rectangular_grids_differ_from_the_published_network_by_its_three_bugs(monkeypatch):
    """Only with the three bugs added, the outputs at 2 x 4 windows equal the recorded ones."""
    data = goldens.numbers("fastervit", BROKEN)
    model = timm.create_model("fastervit_0").double().eval()
    # First fault: no embedding of carrier tokens, so the file lacks its weights.
    loaded = model.load_state_dict(convert(goldens.published_state("fastervit", BROKEN), "fastervit_0"), strict=False)
    assert not loaded.unexpected_keys
    assert {key.split(".")[4] for key in loaded.missing_keys} == {"carrier_pos_embed"}

    with torch.no_grad():
        early = model.stages[:2](model.stem(goldens.image(goldens.manifest("fastervit", BROKEN)["input_shape"])))
    # Convolutions know no windows.
    goldens.assert_close(goldens.sample(early), data["stage1_sample"], std=data["stage1_std"].item())

    def errors():
        with torch.no_grad():
            maps = [model.stages[2](early)]
            maps.append(model.stages[3](maps[0]))
        pairs = [(goldens.sample(m), data[f"stage{i}_sample"]) for i, m in enumerate(maps, start=2)]
        return [((a - b).abs().max() / data[f"stage{i}_std"]).item() for i, (a, b) in enumerate(pairs, start=2)]

    assert min(errors()) > 1e-5

    blocks = model.stages[2].blocks
    for block in blocks:
        torch.nn.init.zeros_(block.carrier_pos_embed.mlp.fc2.weight)
        # Second: the bias of a 5 x 5 grid (5 = floor(sqrt(4 * 8))) lies over the last 25 of the 4 x 8 carrier tokens.
        bias = block.carriers.attn.bias
        monkeypatch.setattr(
            bias, "forward", lambda size, extra, bias=bias: F.pad(type(bias).forward(bias, (5, 5), 0), (7, 0, 7, 0))
        )
    assert min(errors()) > 1e-5

    partition = fastervit.to_windows

    def rows_for_columns(x, window):
        if window != (2, 2):
            return partition(x, window)
        # Third: on the way back to the windows their rows are taken for columns.
        batch, height, width, dim = x.shape
        return partition(x.reshape(batch, width, height, dim), window).reshape(
            batch, height // 2, width // 2, 2, 2, dim
        )

    monkeypatch.setattr(fastervit, "to_windows", rows_for_columns)
    assert max(errors()) < goldens.TOLERANCE


@pytest.mark.parametrize("card", costs_of(cards("fastervit*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost_and_licence(card):
    model = assert_cost(card, abs=6e-4)
    assert "NON-COMMERCIAL" in card.licence
    assert "NON-COMMERCIAL" in model.default_cfg["license"]


def test_transposed_images_give_transposed_maps():
    """With symmetric weights nothing distinguishes rows from columns, whatever the grid: 2 x 4 windows and 4 x 2."""
    torch.manual_seed(0)
    model = timm.create_model("fastervit_0", **SHALLOW).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 4:
                parameter.copy_((parameter + parameter.mT) / 2)
            elif key.endswith("mlp.fc1.weight") and parameter.shape[1] == 2:
                parameter.copy_(parameter.mean(1, keepdim=True).expand_as(parameter))
        image = torch.randn(1, 3, 224, 448, dtype=torch.float64)
        wide, tall = (model.forward_intermediates(x, intermediates_only=True) for x in (image, image.mT))
    for a, b in zip(wide, tall, strict=True):
        torch.testing.assert_close(a, b.mT)


def test_masked_padding_is_not_attended_to():
    """One window of attention: what is computed on real tokens does not depend on the padded ones."""
    torch.manual_seed(0)
    arguments = dict(SHALLOW, hierarchical=False)
    masked = timm.create_model("fastervit_0", mask_padding=True, **arguments).double().eval()
    plain = timm.create_model("fastervit_0", **arguments).double().eval()
    plain.load_state_dict(masked.state_dict())
    whole, part = torch.randn(1, 3, 224, 224, dtype=torch.float64), torch.randn(1, 3, 96, 160, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(masked(whole), plain(whole))
        assert not torch.allclose(masked(part), plain(part))
        stage = masked.stages[3]
        blocks, seen = stage.blocks, []
        blocks[0].register_forward_hook(lambda module, inputs, out: seen.append((inputs, out[0])))
        stage(torch.randn(1, 64, 10, 9, dtype=torch.float64))
        (x, _, mask), out = seen[0]
        assert mask.sum() == 5 * 5
        noisy = torch.where(mask[..., None], x, torch.randn_like(x))
        torch.testing.assert_close(blocks[0](noisy, None, mask)[0][mask], out[mask])


def test_propagation_adds_the_carriers_to_their_window():
    """As nearest upsampling: of 7 rows, four take the upper carrier token and three the lower one."""
    torch.manual_seed(0)
    model = timm.create_model("fastervit_3", **SHALLOW)
    assert [block.propagate for block in model.stages[2].blocks] == [False, True]
    block = model.stages[2].blocks[1].double().eval()
    torch.nn.init.normal_(block.carriers.scale1.gamma)
    x, ct = torch.randn(6, 49, 64, dtype=torch.float64), torch.randn(1, 4, 6, 64, dtype=torch.float64)
    with torch.no_grad():
        with_it, carried = block(x, ct)
        block.propagate = False
        without, _ = block(x, ct)
    added = (with_it - without).view(1, 2, 3, 7, 7, 64)
    for i in range(7):
        for j in range(7):
            expected = carried[:, i * 2 // 7 :: 2, j * 2 // 7 :: 2] * block.carriers.scale1.gamma
            torch.testing.assert_close(added[:, :, :, i, j], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window_size=7), "window_size must have one entry for each of 2 stages; got 7"),
        (dict(num_heads=(8, 16, 32)), r"num_heads must have one entry for each of 2 stages; got \(8, 16, 32\)"),
        (dict(num_heads=(7, 16)), r"num_heads must divide \[256, 512\], the widths of their stages; got \(7, 16\)"),
        (dict(num_heads=(8, 0)), "num_heads must divide"),
        (dict(depths=(1, 1, 1)), "depths must have one entry for each of 4 stages"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("fastervit_0", **arguments)


def test_windows_narrower_than_their_carrier_tokens_are_named():
    with pytest.raises(ValueError, match=r"window_size must be 2 or more in both stages; got \(1, 7\)"):
        timm.create_model("fastervit_0", window_size=(1, 7))


def test_pretrained_weights_report_their_licence(caplog, monkeypatch):
    monkeypatch.setattr(fastervit, "build", lambda *args, **kwargs: args)
    assert fastervit.fastervit_0(pretrained=True)[2:] == ("fastervit_0", True)
    assert "NON-COMMERCIAL" in caplog.text
    caplog.clear()
    fastervit.fastervit_0()
    assert not caplog.text


def test_folding_removes_batch_norms_before_the_head_and_keeps_the_outputs():
    torch.manual_seed(0)
    model = timm.create_model("fastervit_0", **SHALLOW).double()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        model.train()(image)  # so that the running statistics are not those of a fresh norm
        expected = model.eval()(image)
        folded = copy.deepcopy(model).fuse()
        torch.testing.assert_close(folded(image), expected)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [key for key, m in folded.named_modules() if isinstance(m, FixedNorm)] == ["norm"]
