"""What a query sees: weights against the layers' formulas, where they lie in the image, the picture, the verb."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from networks import BLOCKS, few_blocks, mostly
from PIL import Image
from torch import nn

from hybridzoo import layers
from hybridzoo.backbones import maxvit
from hybridzoo.kernels import bi_level_route
from hybridzoo.kernels.neighborhood.reference import axis_table
from hybridzoo.layers.rotary import rotate
from hybridzoo.train import cli, trained
from hybridzoo.train.show import picture
from hybridzoo.train.show.attentions import find_layers
from hybridzoo.train.show.probe import look
from hybridzoo.train.show.showing import choose, find_network, point_in

DIM, HEADS = 32, 2
EVERY_KIND = {
    "agent_deit_tiny", "agent_swin_tiny", "biformer_tiny", "dat_plus_tiny", "efficientvit_mit_b0",
    "efficientvit_msra_m0", "fastervit_0", "inline_cswin_tiny", "litv2_small", "maxvit_tiny", "overlock_xtiny",
    "patnet_t0", "ravlt_tiny", "vitrpb_small",
}  # fmt: skip


class Net(nn.Module):
    """A network of one attention on a map of the image's own pixels, NHWC inside; `stages.0.blocks.0` is its name."""

    feature_info = ({"module": "stages.0", "reduction": 1, "num_chs": DIM},)

    def __init__(self, attention: nn.Module, nchw: bool = False) -> None:
        super().__init__()
        stage = nn.Module()
        stage.blocks = nn.Sequential(attention)
        self.stages = nn.Sequential(stage)
        self.nchw = nchw

    def forward_features(self, x):
        block = self.stages[0].blocks[0]
        if isinstance(block, layers.ContextMixing):
            return block(x, x[:, : DIM // 2], x.flip(1))
        return block(x if self.nchw else x.permute(0, 2, 3, 1))


def see(attention, size=(10, 15), query=(4, 6), nchw=False, at=0):
    """The weights of one layer in float64, and the map that it was given."""
    torch.manual_seed(0)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    net = Net(attention.double().eval(), nchw)
    x = torch.randn(1, DIM, *size, dtype=torch.float64)
    point = ((query[1] + 0.3) / size[1], (query[0] + 0.7) / size[0])
    seen = look(net, x, [find_layers(net)[at]], point)[0]
    assert seen.query == query
    return seen, (x if nchw else x.permute(0, 2, 3, 1))


def projected(attention, x, parts=3, name="qkv"):
    """Queries, keys, ... of every head: `(parts, heads, rows, columns, head_dim)`."""
    made = attention.get_submodule(name)(x)[0].detach()
    return made.unflatten(-1, (parts, HEADS, -1)).permute(2, 3, 0, 1, 4)


def by_softmax(scores):
    """`(heads, rows, columns)` of scores, minus infinity where nothing is seen."""
    return scores.flatten(1).softmax(1).view(scores.shape)


def close(seen, expected):
    np.testing.assert_allclose(seen.weights, expected.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize(("kernel", "dilation", "query"), [(3, 1, (4, 6)), (5, 2, (0, 14)), (3, (2, 3), (9, 0))])
def test_a_neighborhood_agrees_with_the_reference(kernel, dilation, query):
    attention = layers.NeighborhoodAttention2d(DIM, HEADS, kernel, dilation)
    seen, x = see(attention, query=query)
    q, k, _ = projected(attention, x)
    scores = torch.full((HEADS, 10, 15), -torch.inf, dtype=torch.float64)
    steps = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    rows, columns = (axis_table(side, kernel, step)[at] for side, step, at in zip((10, 15), steps, query, strict=True))
    for row, bias_row in zip(*rows, strict=True):
        for column, bias_column in zip(*columns, strict=True):
            product = (q[:, query[0], query[1]] * k[:, row, column]).sum(-1) * (DIM // HEADS) ** -0.5
            scores[:, row, column] = product + attention.rpb[:, bias_row, bias_column]
    close(seen, by_softmax(scores))
    assert (seen.weights[0] != 0).sum() == kernel**2


def test_padding_of_a_small_map_has_the_rest_of_the_weight():
    seen, _ = see(layers.NeighborhoodAttention2d(DIM, HEADS, 7, padding="bias"), (5, 9), (2, 2))
    assert seen.beyond.min() > 0.01
    np.testing.assert_allclose(seen.weights.sum((1, 2)) + seen.beyond, 1, atol=1e-12)


def test_routed_keys_are_those_of_the_chosen_regions():
    attention = layers.BiLevelRoutingAttention(DIM, HEADS, topk=2, regions=(2, 5))
    seen, x = see(attention)
    q, k, _ = projected(attention, x)
    bchw = [part.permute(1, 2, 0, 3)[None] for part in (q, k)]
    region = 4 // 5 * 5 + 6 // 3  # 2 x 5 regions of 5 x 3 tokens
    chosen = bi_level_route(*bchw, (2, 5), 2)[0, region]
    number = torch.arange(10)[:, None] // 5 * 5 + torch.arange(15) // 3
    scores = (k * q[:, 4, 6, None, None]).sum(-1) * DIM**-0.5
    close(seen, by_softmax(scores.masked_fill(~torch.isin(number, chosen), -torch.inf)))
    assert seen.region == (5, 3)


def test_agents_weights_are_the_product_of_both_softmaxes():
    attention = layers.AgentAttention(DIM, HEADS, agents=3, table_size=7)
    seen, x = see(attention)
    q, k, _ = (part.flatten(1, 2) for part in projected(attention, x))
    agents = (
        attention.pool(attention.qkv(x).flatten(1, 2)[..., :DIM], (10, 15))[0]
        .unflatten(-1, (HEADS, -1))
        .transpose(0, 1)
    )
    to_agents, to_queries = attention.biases((10, 15))
    scale = (DIM // HEADS) ** -0.5
    broadcast = (scale * q @ agents.transpose(1, 2) + to_queries).softmax(-1)[:, 4 * 15 + 6, None]
    close(seen, (broadcast @ (scale * agents @ k.transpose(1, 2) + to_agents).softmax(-1)).view(HEADS, 10, 15))


def test_in_line_weights_subtract_their_mean():
    attention = layers.InLineAttention(DIM, HEADS)
    seen, x = see(attention)
    q, k, _ = projected(attention, x)
    products = (k * q[:, 4, 6, None, None]).sum(-1) * (DIM // HEADS) ** -0.5 / 150
    close(seen, products - products.mean((1, 2), keepdim=True) + 1 / 150)
    assert seen.weights.min() < 0


def test_relu_linear_weights_are_products_over_their_sum():
    attention = layers.MultiScaleLinearAttention(DIM, head_dim=16)
    seen, x = see(attention, nchw=True)
    qkv = attention.qkv(x)
    scales = torch.cat([qkv, attention.aggregate[0](qkv)], 1)[0].permute(1, 2, 0).unflatten(-1, (4, 3, 16))
    q, k = scales[..., 0, :].relu()[4, 6], scales[..., 1, :].relu()
    products = (q * k).sum(-1).permute(2, 0, 1)
    close(seen, products / products.sum((1, 2), keepdim=True))


def test_rank_augmented_weights_agree_with_the_paper():
    attention = layers.RankAugmentedAttention(DIM, HEADS)
    seen, x = see(attention)
    q, k = (nn.functional.elu(part.flatten(1, 2)) + 1 for part in projected(attention, x, 4, "qkvg")[:2])
    share = (k @ q.mean(1)[..., None] * (DIM // HEADS) ** -0.5).softmax(1)
    turn = attention.rotary(10, 15, torch.float64, torch.device("cpu"))
    one = rotate(q[None], turn)[0, :, 4 * 15 + 6, None] @ rotate((share * k)[None], turn)[0].transpose(1, 2)
    normaliser = (q[:, 4 * 15 + 6] * (share * k).sum(1)).sum(-1) + 1e-6
    close(seen, (one / normaliser[:, None, None]).view(HEADS, 10, 15))


def test_dynamic_kernels_see_their_windows():
    attention = layers.ContextMixing(DIM, DIM // 2, HEADS, 7)
    small, _ = see(attention, nchw=True)
    large, _ = see(attention, nchw=True, at=1)
    assert [(seen.weights[0] != 0).sum() for seen in (small, large)] == [25, 49]
    np.testing.assert_array_equal(np.argwhere(small.weights[0]).min(0), (2, 4))
    for seen in (small, large):
        np.testing.assert_allclose(seen.weights.sum((1, 2)), 1, atol=1e-12)


def test_sampled_points_have_the_softmax_of_their_scores():
    attention = layers.DeformableAttention(DIM, HEADS, groups=2, table_size=7, stride=3)
    seen, x = see(attention)
    from hybridzoo.layers.sampling import sample_map

    query = attention.query(x)
    places = attention.places(query).flatten(2, 3)
    key = attention.key(sample_map(x, places))[0].unflatten(-1, (HEADS, -1)).transpose(0, 1)
    rows, columns = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in (10, 15))
    scores = key @ query[0, 4, 6].unflatten(-1, (HEADS, -1))[..., None] * (DIM // HEADS) ** -0.5
    bias = attention.bias(rows, columns, places)[0, :, 4 * 15 + 6]
    weights = (scores[..., 0] + bias).softmax(1)
    np.testing.assert_allclose(seen.places[..., 2], weights.detach().numpy(), atol=1e-12)
    on_map = (places[0].detach().numpy() + 1) / 2 * (9, 14)
    np.testing.assert_allclose(seen.places[..., :2], on_map, atol=1e-12)
    # The same weights, spread over the tokens around each point: their mean is the points' mean.
    np.testing.assert_allclose(seen.weights.sum((1, 2)), 1, atol=1e-12)
    middle = (seen.weights * np.arange(10)[:, None]).sum((1, 2))
    np.testing.assert_allclose(middle, (seen.places[..., 2] * on_map[..., 0]).sum(1), atol=1e-12)


LOCAL = {
    "shifted window": lambda: layers.ShiftedWindowAttention(DIM, HEADS, 4, shift=2),
    "window": lambda: layers.ShiftedWindowAttention(DIM, HEADS, 4),
    "grid": lambda: maxvit.PartitionAttention(DIM, (4, 4), True, 0.0, "bilinear"),
    "partition": lambda: maxvit.PartitionAttention(DIM, (4, 4), False, 0.0, "bilinear"),
    "neighborhood": lambda: layers.NeighborhoodAttention2d(DIM, HEADS, 3, 2),
    "high frequencies": lambda: layers.HiLoAttention(DIM, HEADS, alpha=0),
    "cascaded": lambda: layers.CascadedGroupAttention(DIM, HEADS, window=4),
}


@pytest.mark.parametrize("query", [(4, 6), (9, 14), (0, 0)])
@pytest.mark.parametrize("name", LOCAL)
def test_exactly_the_keys_that_are_seen_change_the_result(name, query):
    """Without a look into the layer: every token is changed in turn, on a map that windows do not divide."""
    attention, nchw = LOCAL[name](), name == "cascaded"
    seen, x = see(attention, query=query, nchw=nchw)
    if name == "grid" or name == "partition":  # the block's residual and MLP follow; both keep tokens apart
        attention = nn.Sequential(attention)
    if nchw:
        x = x.permute(0, 2, 3, 1)
    changed = x.repeat(151, 1, 1, 1).clone()
    for index in range(150):
        changed[1 + index, index // 15, index % 15] += torch.randn(DIM, dtype=x.dtype)
    with torch.no_grad():
        out = attention(changed.permute(0, 3, 1, 2) if nchw else changed)
    out = out.permute(0, 2, 3, 1) if nchw else out
    differ = (out[1:, query[0], query[1]] - out[0, query[0], query[1]]).abs().amax(-1).view(10, 15) > 1e-9
    sees = (seen.weights != 0).any(0)
    sees[query] = True  # its own query
    np.testing.assert_array_equal(differ.numpy(), sees)


def test_means_of_windows_share_their_weight():
    seen, x = see(attention := layers.HiLoAttention(DIM, HEADS, alpha=1), (8, 6), (3, 3))
    blocks = seen.weights.reshape(HEADS, 4, 2, 3, 2)
    np.testing.assert_allclose(blocks, np.broadcast_to(blocks[:, :, :1, :, :1], blocks.shape), atol=1e-15)
    means = x.unflatten(1, (4, 2)).unflatten(3, (3, 2)).mean((2, 4))[0].flatten(0, 1)
    key = attention.low_kv(means)[:, :DIM].unflatten(-1, (HEADS, -1)).transpose(0, 1)
    query = attention.low_q(x)[0, 3, 3].unflatten(-1, (HEADS, -1))[..., None]
    weights = ((key @ query)[..., 0] * (DIM // HEADS) ** -0.5).softmax(1).view(HEADS, 4, 3)
    np.testing.assert_allclose(blocks.sum((2, 4)), weights.detach().numpy(), atol=1e-12)


# Networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly(sorted(BLOCKS), EVERY_KIND))
def test_all_weight_of_every_network_is_found(name):
    """On an image that no window divides: a softmax's weights sum to 1, and the query's token is where it was asked."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **few_blocks(name)).double().eval()
    for layer in model.modules():  # some start with branches, or queries, that are all but zero
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    found = look(model, torch.randn(1, 3, 72, 104, dtype=torch.float64), find_layers(model), (0.99, 0.01))
    assert found
    for seen in found:
        rows, columns = seen.weights.shape[1:]
        assert seen.query == (0, columns - 1)
        assert rows * seen.cell > 72 - seen.cell
        assert columns * seen.cell > 104 - seen.cell
        whole = seen.weights.sum((1, 2)) + seen.extra.sum(1) + seen.beyond
        if seen.layer.sort not in ("rank-augmented linear",):
            np.testing.assert_allclose(whole, 1, atol=1e-6)
        if not seen.layer.signed:
            assert seen.weights.min() >= -1e-12


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "maxvit_rmlp_pico_rw_256"])
def test_timms_own_networks(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    found = look(
        model, torch.randn(1, *model.pretrained_cfg["input_size"]), choose(find_layers(model), None, None), (0.4, 0.6)
    )
    for seen in found:
        np.testing.assert_allclose(seen.weights.sum((1, 2)) + seen.extra.sum(1) + seen.beyond, 1, atol=1e-4)
    if "swin" in name:
        count = {seen.layer.sort: (seen.weights[0] > 1e-6).sum() for seen in found if seen.layer.place[0] == 1}
        assert count == {"window": 49, "shifted window": 49}


def test_measuring_attention_does_not_change_the_network():
    model = timm.create_model("dinat_mini", **few_blocks("dinat_mini")).eval()
    image = torch.randn(1, 3, 64, 64)
    before = model(image)
    look(model, image, find_layers(model), (0.5, 0.5))
    torch.testing.assert_close(model(image), before, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# Choosing -------------------------------------------------------------------------------------------------------------


def test_layers_are_chosen_by_stage_block_and_sort():
    found = find_layers(timm.create_model("dinat_mini"))
    everything = [(layer.place, layer.sort) for layer in choose(found, None, None)]
    assert everything[:2] == [((1, 3), "neighborhood"), ((1, 2), "dilated neighborhood")]
    assert len(everything) == 7
    assert [layer.place for layer in choose(found, 3, None)] == [(3, 5), (3, 6)]
    assert [layer.place for layer in choose(found, 3, 1)] == [(3, 1)]
    assert [layer.place[1] for layer in choose(find_layers(timm.create_model("test_vit")), None, None)] == [2, 3, 4, 6]


@pytest.mark.parametrize(
    ("query", "expected"),
    [(None, (0.5, 0.5)), ("0.25,0.5", (0.25, 0.5)), ("0,0", (0.0025, 0.005)), ("199,99", (0.9975, 0.995))],
)
def test_a_query_is_a_pixel_or_a_fraction(query, expected):
    assert point_in(query, (0, 0, 200, 100)) == pytest.approx(expected)


def test_a_query_is_a_position_in_the_whole_picture():
    assert point_in("100,50", (50, 0, 150, 100)) == pytest.approx((0.505, 0.505))
    assert point_in("0.5,0.5", (50, 0, 150, 100)) == pytest.approx((0.5, 0.5))


# The verb -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return "photo.png"


def run(capsys, *words):
    code = cli.run(["show", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_verb_draws_and_writes(capsys, photo):
    words = [
        "biformer_tiny",
        photo,
        "--weights",
        "none",
        "--query",
        "45,10",
        "--stage",
        "2",
        "--img-size",
        "64",
        "--json",
    ]
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "stage 2, block 2: routed, the best 4 of 7 x 7 regions; sees" in out
    assert "drawn: attention/biformer_tiny.png; written: attention/biformer_tiny.json" in out
    assert Image.open("attention/biformer_tiny.png").width > 300
    with open("attention/biformer_tiny.json", encoding="utf-8") as file:
        content = json.load(file)
    assert content["input_size"] == [96, 64]
    assert content["query"] == pytest.approx([45.5 / 60 * 96, 10.5 / 40 * 64])
    (layer,) = content["layers"]
    assert layer["query"] == [2, 9]
    assert np.shape(layer["weights"]) == (4, 8, 12)
    assert layer["cell"] == 8


def test_the_query_is_marked_where_it_is(photo):
    """The cross has its colour at the query's place in the picture, and the map does not leave the image."""
    model = timm.create_model("nat_mini", **few_blocks("nat_mini")).eval()
    seen = look(model, torch.randn(1, 3, 64, 96), find_layers(model)[:1], (0.25, 0.75))
    drawn = picture.draw(Image.new("RGB", (96, 64), "white"), seen, (0.25, 0.75), None, "title")
    pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB")).astype(int)
    marked = np.argwhere(np.abs(pixels - (0x26, 0xE0, 0xFF)).sum(-1) < 40)
    dimmed = np.abs(pixels - 255 * picture.DIM).sum(-1) < 9
    (top, bottom), (left, right) = (np.flatnonzero(dimmed.sum(axis) > 99)[[0, -1]] for axis in (1, 0))
    middle = (marked.min(0) + marked.max(0)) / 2
    assert middle == pytest.approx((top + 0.75 * (bottom - top), left + 0.25 * (right - left)), abs=8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convnext_atto", "photo.png", "--weights", "none"], "convnext_atto has no attention"),
        (["biformer_tini", "photo.png"], "did you mean biformer_tiny"),
        (["nat_mini", "nowhere.png"], "PICTURE nowhere.png: no such file"),
        (["nat_mini", "photo.png", "--query", "12"], "--query 12: give X,Y"),
        (["nat_mini", "photo.png", "--query", "60,10"], "--query 60,10: is outside"),
        (["nat_mini", "photo.png", "--stage", "5"], "--stage 5: has no attention; stages with attention: 1, 2, 3, 4"),
        (["nat_mini", "photo.png", "--stage", "1", "--block", "4"], "--block 4: has no attention; blocks with"),
        (["nat_mini", "photo.png", "--head", "3"], "--head 3: the layers have heads 1 to 2"),
        (["nat_mini", "photo.png", "--head", "all"], "--head all: give a number from 1, or mean"),
        (["nat_mini", "photo.png", "--out", "photo.png"], "photo.png: is the picture itself"),
        (["nat_mini", "photo.png", "--out", "seen.tif"], "--out seen.tif: give a name that ends in one of .png"),
        (["nat_mini", "photo.png", "--weights", "no.pth"], "weights no.pth: no such file"),
    ],
)
def test_bad_input_is_one_line(capsys, photo, words, said):
    if "--weights" not in words:
        words = [*words, "--weights", "none"]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_run_knows_its_network(capsys, photo, image_folder, run_config):
    from hybridzoo.train import engine

    config = run_config("train_cfg.max_epochs=1", "custom_hooks=[]")
    engine.train(config, work_dir="run", data=image_folder, wandb=False)
    code, out, err = run(capsys, "run", photo, "--head", "2")
    assert code == 0, err
    assert out.count("global, the whole map; sees all") == 4
    assert "drawn: attention/run.png" in out
    assert find_network("run", None, None).side == trained.read(Path("run/final.pth"))["input"]["input_size"] != 224
    assert find_network("run", None, 96).side == 96


def test_the_examples_of_the_help_run(capsys, photo):
    assert cli.run(["show", "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [line.split()[3:] for line in lines if line.startswith("$ hybridzoo show ")]
    assert len(examples) == 2
    for words in examples:
        code, out, err = run(capsys, *words)
        assert code == 0, err
        assert "drawn: attention/" in out
