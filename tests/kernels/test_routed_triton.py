"""Routed attention in Triton: computed by its interpreter (or a GPU, if there is one), compiled for three chips."""

from __future__ import annotations

import math
import re

import goldens
import pytest
import torch
import triton_builds
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_tests import (
    DEVICE,
    INTERPRETED,
    assert_as_good,
    compiles,
    computes,
    results,
)

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from hybridzoo.kernels import routed_attention2d, triton_common
from hybridzoo.kernels.routed import api, operators, reference, torch_impl, triton_configs, triton_impl
from hybridzoo.kernels.routed.grid import Grid
from hybridzoo.kernels.routed.triton_kernels import divide, inverse
from hybridzoo.kernels.triton_common import Config

CASES = {  # batch, map, heads, head_dim, grid, topk, fill, small form
    "one token a region": (2, (4, 5), 2, 16, Grid(4, 5, 1, 1), 3, False, True),
    "four tokens a region, small": (2, (6, 6), 2, 32, Grid(3, 3, 2, 2), 4, False, True),
    "four tokens a region, listed": (1, (6, 6), 1, 16, Grid(3, 3, 2, 2), 2, False, False),
    "partial regions, duplicates": (1, (5, 7), 1, 24, Grid(3, 4, 2, 2), 14, False, True),
    "partial regions, head_dim no power of two": (1, (7, 7), 1, 40, Grid(2, 2, 4, 4), 2, False, False),
    "a region in two tiles": (1, (9, 17), 1, 16, Grid(1, 2, 9, 9), 1, False, False),
    "a region of whole blocks": (1, (16, 8), 1, 16, Grid(2, 1, 8, 8), 1, False, False),
    "a region of parts of blocks": (2, (5, 8), 1, 16, Grid(2, 2, 3, 4), 1, False, False),
    "one region": (2, (3, 4), 1, 64, Grid(1, 1, 3, 4), 2, False, True),
    "filled, listed": (1, (7, 5), 1, 16, Grid(2, 2, 5, 3), 2, True, False),
    "filled, small, whole regions beyond": (1, (5, 3), 1, 16, Grid(3, 3, 2, 2), 3, True, True),
    "widest head": (1, (4, 5), 1, 128, Grid(1, 2, 4, 3), 1, False, False),
}


IMAGES = 1 if INTERPRETED else 2  # where images do not matter: interpreting takes long
more = pytest.mark.exhaustive if INTERPRETED else ()


@pytest.fixture(autouse=INTERPRETED)
def _small_form_in_float32(monkeypatch):
    """The interpreter has no registers to run out of, and is more exact in float32."""
    monkeypatch.setattr(triton_impl, "ITEMSIZES", (2, 4))
    monkeypatch.setattr(triton_impl, "SMALL_MAX_WIDTH", 64)
    for kind, queries in (("forward_small", 32), ("backward_small", 0), ("backward_single", 16)):
        for block_d in (32, 64):
            monkeypatch.setitem(triton_configs.TABLE, (kind, block_d, 4), Config(queries, 16, 1, 1))


def leaves(batch, size, heads, head_dim, fill, dtype):
    """Query, key, value and (or None) fill on the device, leaves; the fill stays float32."""
    qkv = [torch.randn(batch, *size, heads, head_dim).to(DEVICE, dtype).requires_grad_() for _ in range(3)]
    return [*qkv, torch.randn(2, heads, head_dim).to(DEVICE).requires_grad_() if fill else None]


def random_routes(batch, grid, topk):
    return torch.randint(0, grid.regions, (batch, grid.regions, topk))


def attend(q, k, v, fill, routes, grid, scale=0.3):
    size = dict(region_size=grid[2:], fill=fill, scale=scale, impl="triton")
    return routed_attention2d(q, k, v, routes.to(DEVICE), grid[:2], **size)


def assert_as_good_as_the_definition(tensors, routes, grid, scale=0.3):
    assert_as_good(
        lambda *t: attend(*t, routes, grid, scale),
        lambda q, k, v, fill: reference.routed_attention2d(q, k, v, routes, grid, scale, fill),
        tensors,
    )


@computes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients(case, dtype):
    batch, size, heads, head_dim, grid, topk, fill, is_small = CASES[case]
    torch.manual_seed(0)
    tensors = leaves(batch, size, heads, head_dim, fill, dtype)
    if reason := triton_common.unsupported(tensors[0]):
        pytest.skip(reason)
    if INTERPRETED and dtype == torch.float16 and "filled" not in case:
        pytest.skip("slow to interpret; float32 covers the shape")
    if INTERPRETED or dtype != torch.float32:
        assert triton_impl.small(tensors[0], grid, topk) == is_small
    assert_as_good_as_the_definition(tensors, random_routes(batch, grid, topk), grid)


@computes
@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("case", ["partial regions, filled", "small, filled"])
def test_any_scale(scale, case):
    """The forward pass takes the maximum over products."""
    grid, size, topk = (Grid(3, 3, 2, 2), (5, 6), 4) if "small" in case else (Grid(2, 2, 4, 4), (7, 8), 2)
    torch.manual_seed(0)
    tensors = leaves(1, size, 1, 16, True, torch.float16 if "small" in case else torch.float32)
    assert triton_impl.small(tensors[0], grid, topk) == ("small" in case)
    assert_as_good_as_the_definition(tensors, random_routes(1, grid, topk), grid, scale)


@st.composite
def shapes(draw):
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    filled = draw(st.booleans())
    sizes = [
        count * size - draw(st.integers(0, (count if filled else 1) * size - 1))
        for count, size in ((rows, height), (columns, width))
    ]
    topk = draw(st.integers(1, rows * columns + 1))
    return Grid(rows, columns, height, width), sizes, filled, topk, draw(st.integers(16, 40)), draw(st.integers(0, 99))


@computes
@settings(max_examples=200 if DEVICE == "cuda" else 5, deadline=None)
@given(shape=shapes())
def test_any_shape(shape):
    """With the smallest blocks, so that small maps have many tiles and many blocks of keys."""
    grid, size, filled, topk, head_dim, seed = shape
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_configs, "TABLE", dict.fromkeys(triton_configs.TABLE, Config(16, 16, 1, 1)))
        tensors = leaves(1, size, 1, head_dim, filled, torch.float32)
        assert_as_good_as_the_definition(tensors, random_routes(1, grid, topk), grid)


CORES = [n for n in goldens.names("ops", numeric=True) if n.startswith("bra_core_")]
LARGE = [n for n in CORES if "nchw" in n or "21x28" in n]


@computes
@pytest.mark.parametrize("name", [pytest.param(n, marks=more if n in LARGE else ()) for n in CORES])
def test_published_values_and_gradients(name):
    """In float32, and with every head widened by zeros where the fixture's is too narrow for tensor cores."""
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    heads, channels = meta["heads"], data["q"].shape[-1]
    if INTERPRETED:  # neither images nor heads depend on each other
        data = {
            key: value[:1] if key == "topk_index" else value[:1, ..., : channels // heads]
            for key, value in data.items()
        }
        heads = 1
    grid = Grid(*meta["regions"], *meta["region_size"])
    inputs = [data[n].float().to(DEVICE).requires_grad_() for n in "qkv"]
    maps = [t.unflatten(-1, (heads, -1)) for t in inputs]
    narrow = maps[0].shape[4]
    q, k, v = (torch.nn.functional.pad(t, (0, max(0, 16 - narrow))) for t in maps)
    fill = None if not any(grid.beyond(q)) else torch.zeros(2, *q.shape[3:], device=DEVICE)
    out = attend(q, k, v, fill, data["topk_index"], grid, meta["scale"])[..., :narrow].flatten(3)
    grads = torch.autograd.grad(out, inputs, data["grad_out"].float().to(DEVICE))
    for ours, letter in zip((out, *grads), ("out", "grad_q", "grad_k", "grad_v"), strict=True):
        expected = data[letter]
        error = (ours.detach().cpu().double() - expected).abs().max() / expected.std()
        assert error < 2e-5, f"{letter}: {error:.1e}"


@computes
@pytest.mark.parametrize("topk", [1, 5], ids=["listed", "small"])
@pytest.mark.parametrize("filled", [False, True])
def test_kernels_read_only_their_inputs_and_write_all_outputs(topk, filled):
    """Views of a packed projection inside a larger NaN buffer, and NaN in every fresh allocation."""
    torch.manual_seed(0)
    buffer = torch.full((IMAGES, 5, 8, 3, 3, 29), torch.nan, device=DEVICE)
    packed = buffer[:, 1:4, 1:7, :, 1:, 3:27]
    packed.copy_(torch.randn(packed.shape))
    inside = packed.detach().requires_grad_()
    grid = Grid(2, 3, 2, 2)
    if INTERPRETED:
        assert triton_impl.small(inside[..., 0, :, :], grid, topk) == (topk == 5)
    fill = torch.randn(2, 2, 24, device=DEVICE, requires_grad=True) if filled else None
    routes = random_routes(IMAGES, grid, topk)
    inputs = [t for t in (inside, fill) if t is not None]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()  # the trap is set
        out = attend(*inside.unbind(3), fill, routes, grid)
        grads = torch.autograd.grad(out.sin().sum(), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    expected = reference.routed_attention2d(*exact[0].unbind(3), routes, grid, 0.3, exact[1] if filled else None)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    for grad, e in zip(grads, torch.autograd.grad(expected.sin().sum(), exact), strict=True):
        torch.testing.assert_close(grad.cpu().double(), e, rtol=1e-5, atol=1e-5)


@computes
@pytest.mark.parametrize("filled", [True, False])
def test_operators_are_well_formed(filled):
    torch.manual_seed(0)
    *qkv, fill = leaves(1, (2, 3), 1, 16, filled, torch.float32)
    grid = Grid(1, 2, 2, 2)
    routes = random_routes(1, grid, 2).to(DEVICE)
    where = list(grid), 0.3, "triton"
    torch.library.opcheck(operators.routed_attention2d, (*qkv, routes, fill, *where))
    tensors = [*(t.detach() for t in qkv), routes, fill.detach() if filled else None]
    torch.library.opcheck(operators.bi_level_route, (*tensors[:2], tensors[4], list(grid), 2, 0.3))
    out, lse = operators.routed_attention2d(*tensors, *where)
    for want_fill in {False, filled}:
        arguments = (torch.randn_like(out), *tensors, out, lse, *where, want_fill)
        torch.library.opcheck(operators.routed_attention2d_backward, arguments)


@computes
def test_a_compiled_training_step():
    torch.manual_seed(0)
    tensors = leaves(1, (2, 3), 1, 16, True, torch.float32)
    grid = Grid(1, 2, 2, 2)
    routes, grad = random_routes(1, grid, 2), torch.randn(1, 2, 3, 1, 16, device=DEVICE)
    step = lambda *t: attend(*t, routes, grid).sin()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    torch.testing.assert_close(results(compiled, tensors, grad), results(step, tensors, grad))


@computes
@pytest.mark.parametrize("number", [-1, 4, 1 << 33, *(pytest.param(n, marks=more) for n in (-1000, (1 << 31) - 1))])
def test_routes_out_of_range_read_nothing_outside_the_tensors(number):
    """Keys lie inside a NaN buffer. (The operator looks at routes on a CPU; on a GPU nobody does.)"""
    grid = Grid(2, 2, 3, 3)
    buffer = torch.full((3, 6, 6, 1, 3, 16), torch.nan, device=DEVICE)
    inside = buffer[1:2].unbind(4)
    for t in inside:
        t.copy_(torch.randn(t.shape))
    for topk in (1, 2):
        routes = torch.full((1, 4, topk), number, device=DEVICE)
        assert not triton_impl.small(inside[0], grid, topk)
        out, lse = triton_impl.forward(*inside, routes, None, grid, 0.3)
        assert out.isfinite().all()
        grads = triton_impl.backward(torch.ones_like(out), *inside, routes, None, out, lse, grid, 0.3, False)
        for grad in grads[topk == 1 : 3]:  # in a single pass, queries without a region have no gradient at all
            assert grad.isfinite().all()


@triton.jit
def divide_all(numbers, divisor, quotients, remainders, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    quotient, remainder = divide(tl.load(numbers + index), divisor, inverse(divisor))
    tl.store(quotients + index, quotient)
    tl.store(remainders + index, remainder)


@computes
@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 21, 273, 65536, 99_991, (1 << 31) - 1])
def test_division_by_a_multiplication_is_exact(divisor):
    torch.manual_seed(0)
    near = torch.arange(-2, 3) + divisor * torch.tensor([[1], [2], [3], [((1 << 31) - 3) // divisor]])
    numbers = torch.cat(
        [near.flatten(), torch.arange(8), torch.randint(1 << 31, (100,)), torch.tensor([(1 << 31) - 1])]
    )
    numbers = numbers.clamp(0, (1 << 31) - 1)[:128]
    given = torch.cat([numbers, numbers.new_zeros(256 - len(numbers))]).to(DEVICE, torch.int32)
    quotients, remainders = torch.empty_like(given), torch.empty_like(given)
    divide_all[(1,)](given, divisor, quotients, remainders, 256)
    assert torch.equal(quotients, given // divisor)
    assert torch.equal(remainders, given % divisor)


def test_tuning_offers_tall_tiles_where_regions_are_large():
    default = Config(64, 64, 4, 2)
    key = triton_configs.Key("routed", "forward", 32, 2, "64 regions of 256, top 1")
    assert triton_configs.candidates(key, default)[0] == Config(128, 64, 8, 2)
    for other in (key._replace(kernel="backward_key"), key._replace(shape="49 regions of 64, top 1")):
        assert Config(128, 64, 8, 2) not in triton_configs.candidates(other, default)[:8]


@computes
def test_query_key_and_value_may_have_different_strides():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 6, 2, 16, device=DEVICE)
    other = k.transpose(1, 3).contiguous().transpose(1, 3), v.transpose(3, 4).contiguous().transpose(3, 4)
    grid = Grid(2, 2, 2, 3)
    routes = random_routes(1, grid, 2)
    assert torch.equal(attend(q, *other, None, routes, grid), attend(q, k, v, None, routes, grid))


@computes
def test_unlisted_regions_have_no_gradient_and_repeated_ones_count_twice():
    torch.manual_seed(0)
    q, k, v, _ = leaves(1, (4, 12), 1, 16, False, torch.float32)
    grid = Grid(1, 3, 4, 4)
    routes = torch.tensor([2, 0, 2]).expand(1, 3, 3)
    assert not triton_impl.small(q, grid, 3)
    assert_as_good_as_the_definition([q, k, v, None], routes, grid)
    out = attend(q, k, v, None, routes, grid)
    once = attend(q, k, v, None, routes[..., :2], grid)
    assert not torch.allclose(out, once)
    for grad in torch.autograd.grad(out.sum(), (k, v)):
        assert not grad[:, :, 4:8].any()
        assert grad[:, :, 8:].any()


@computes
@pytest.mark.parametrize(
    ("size", "heads", "head_dim", "grid", "topk", "filled"),
    [
        ((4, 5), 1, 32, Grid(4, 5, 1, 1), 16, False),  # in two tiles
        ((7, 11), 2, 40, Grid(3, 4, 3, 3), 5, False),  # regions reach beyond the map; channels in more than one block
        ((7, 11), 2, 40, Grid(3, 4, 3, 3), 5, True),
        ((4, 9), 1, 16, Grid(1, 1, 4, 9), 1, True),  # a fill that nothing carries
        pytest.param((5, 26), 1, 16, Grid(5, 13, 1, 2), 65, False, marks=more),  # more regions than a number has bits
        pytest.param((9, 34), 1, 16, Grid(9, 17, 1, 2), 153, False, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_choice_of_regions(size, heads, head_dim, grid, topk, filled):
    """Of a packed projection inside NaN, against the definition in float64, and PyTorch's."""
    torch.manual_seed(0)
    buffer = torch.full((IMAGES, size[0] + 1, size[1], 3, heads, head_dim), torch.nan, device=DEVICE)
    query, key, _ = buffer[:, :-1].copy_(torch.randn(IMAGES, *size, 3, heads, head_dim)).unbind(3)
    fill = torch.randn(2, heads, head_dim, device=DEVICE) if filled else None
    found = operators.bi_level_route(query, key, fill, list(grid), topk, 0.3)
    assert found.dtype == torch.int64
    exact = [None if t is None else t.cpu().double() for t in (query, key, fill)]
    logits = reference.route_logits(*exact[:2], grid, 0.3, exact[2])
    assert torch.equal(found.cpu().sort().values, logits.topk(topk).indices.sort().values)
    again = torch_impl.route(query, key, fill, grid, topk, 0.3)
    assert torch.equal(found.sort().values, again.sort().values)


@computes
@pytest.mark.parametrize("name", [pytest.param(n, marks=more if "_n7_" in n else ()) for n in CORES if "nchw" not in n])
def test_published_choice_of_regions(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    data = {key: value[:IMAGES] for key, value in data.items()}
    q, k = (data[n].float().to(DEVICE).unflatten(-1, (meta["heads"], -1)) for n in "qk")
    routes = operators.bi_level_route(q, k, None, list(Grid.of(q, *meta["regions"])), meta["topk"], meta["scale"])
    assert torch.equal(routes.cpu().sort().values, data["topk_index"].sort().values)


@computes
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e30])
def test_a_choice_among_equal_or_nan_scores_lists_each_region_once(value):
    query = torch.full((1, 6, 6, 1, 16), value, device=DEVICE)
    routes = operators.bi_level_route(query, query, None, [3, 3, 2, 2], 4, 1.0)
    assert routes.tolist() == [[[0, 1, 2, 3]] * 9]


@computes
@pytest.mark.parametrize("block", [2, 256])
def test_inverted_routes(monkeypatch, block):
    routes = torch.tensor([[[2, 0], [2, 2], [0, 1]], [[1, 1], [1, 1], [1, 0]]], device=DEVICE)
    monkeypatch.setattr(triton_impl, "INVERSION_BLOCK", block)
    monkeypatch.setattr(triton_impl, "SMALLEST_BLOCK", block)
    query = torch.empty(2, 3, 1, 1, 16, device=DEVICE)
    listing, starts = torch.empty(2, 6, dtype=torch.int32), torch.empty(2, 4, dtype=torch.int32)
    tensors = dict(routes=routes, listing=listing.to(DEVICE), starts=starts.to(DEVICE))
    call = triton_impl._call(query, None, Grid(3, 1, 1, 1), 2, 1.0)
    triton_impl._inversion(call).launch(tensors).run()
    listing, starts = tensors["listing"], tensors["starts"]
    assert starts.tolist() == [[0, 2, 3, 6], [0, 1, 6, 6]]
    assert listing.tolist() == [[0, 2, 2, 0, 1, 1], [2, 0, 0, 1, 1, 2]]


@computes
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
@pytest.mark.parametrize(("side", "topk"), [(56, 1), (28, 4), (14, 16)])
def test_gradients_are_the_same_bits_every_time(side, topk):
    grid = Grid(7, 7, side // 7, side // 7)
    tensors = leaves(16, (side - 1, side), 2, 32, True, torch.bfloat16)
    routes = torch.rand(16, 49, 49).topk(topk).indices
    grad = torch.randn_like(tensors[0])
    first, second = (results(lambda *t: attend(*t, routes, grid), tensors, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=torch.float64), "float64 is not one of"),
        (dict(head_dim=8), "head_dim 8 does not lie between 16 and 128"),
        (dict(head_dim=129), "head_dim 129"),
        (dict(height=1 << 24), "32-bit offsets"),
    ],
)
def test_unsupported_calls_are_named(change, reason):
    case = dict(dtype=torch.float32, head_dim=32, height=9) | change
    query = torch.empty(1, case["height"], 9, 2, case["head_dim"], dtype=case["dtype"], device="meta")
    assert re.search(reason, triton_common.unsupported(query) or "")
    assert triton_common.unsupported(torch.empty(1, 9, 9, 2, 32, device="meta")) is None


@pytest.mark.parametrize(
    ("side", "heads", "head_dim", "regions", "topk", "dtype", "expected"),
    [
        (56, 2, 32, 7, 1, torch.bfloat16, "triton"),
        (28, 4, 32, 7, 4, torch.bfloat16, "triton"),
        (14, 8, 32, 7, 16, torch.bfloat16, "triton"),  # the small form
        (14, 8, 32, 7, 16, torch.float32, "torch"),
        (14, 4, 64, 7, 16, torch.bfloat16, "torch"),
        (14, 8, 32, 7, 4, torch.float32, "triton"),  # the whole map makes more products
        (28, 8, 32, 14, 60, torch.bfloat16, "torch"),  # more regions than a number has bits
    ],
)
def test_the_choice_of_auto_on_a_gpu(monkeypatch, side, heads, head_dim, regions, topk, dtype, expected):
    monkeypatch.undo()  # what the interpreter is given
    monkeypatch.setattr(api.arguments, "implementation", lambda impl, query: "torch" if impl == "torch" else "triton")
    query = torch.empty(1, side, side, heads, head_dim, dtype=dtype, device="meta")
    routes = torch.empty(1, regions**2, topk, dtype=torch.int64, device="meta")
    grid = Grid.of(query, regions, regions)
    assert api._implementation("auto", query, routes, grid) == expected
    assert api._implementation("triton", query, routes, grid) == "triton"
    assert api._implementation("torch", query, routes, grid) == "torch"


def launches(size, heads, head_dim, regions, topk, dtype):
    """What a training step on 128 images of a packed projection launches. Nothing is allocated."""
    shape = (128, *size, heads, head_dim)
    query, key, value = torch.empty(*shape[:3], 3, *shape[3:], dtype=dtype, device="meta").unbind(3)
    out, lse = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(shape[:4], device="meta")
    grid = Grid.of(query, *regions)
    routes = torch.empty(shape[0], grid.regions, topk, dtype=torch.int64, device="meta")
    fill = torch.empty(2, heads, head_dim, device="meta") if any(grid.beyond(query)) else None
    inputs = query, key, value, routes, fill, out, lse
    forward = triton_impl.forward_launch(*inputs, grid, 0.1)
    backward, _ = triton_impl.backward_launches(out, *inputs, out, out, out, grid, 0.1)
    if grid.regions > operators.ROUTE_MAX_REGIONS:  # PyTorch chooses them
        return [forward, *backward]
    return [*triton_impl.route_launches(query, key, fill, routes, grid, 0.1), forward, *backward]


# For each stage, the most instructions of the longest loop or of all code: 3 % more than when they were counted.
MOST = (dict(forward=690, backward_single=421), dict(forward=815, backward_query=810), {})
STAGES = ((4, 2, 1), (8, 4, 4), (16, 8, 16))  # of BiFormer-T and -S: stride, heads, topk; head_dim 32


@compiles
@pytest.mark.parametrize("capability", triton_builds.CAPABILITIES)
def test_the_kernels_of_biformer_compile(capability):
    """Half precision at 224 pixels."""
    per_stage = [launches((224 // s,) * 2, heads, 32, (7, 7), topk, torch.bfloat16) for s, heads, topk in STAGES]
    choice = ["region_means", "choose_regions"]
    listed = [*choice, "forward", "backward_query", "invert_routes", "backward_key"]
    single = [*choice, "forward", "invert_routes", "backward_single"]
    small = [*choice, "forward_small", "backward_small"]
    assert [[launch.kernel.__name__ for launch in stage] for stage in per_stage] == [single, listed, small]
    for stage, most in zip(per_stage, MOST, strict=True):
        triton_builds.assert_builds(capability, stage, most if capability == 90 else None)


@compiles
@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", triton_builds.CAPABILITIES)
def test_the_kernels_of_biformer_at_other_sizes_compile(capability):
    """512 and 800 x 1344 pixels, in the authors' grids and in one of 32 x 32 pixels a region, and stage 2 at 224."""
    for sides, regions in (
        ((224, 224), (7, 7)),
        ((512, 512), (8, 8)),
        ((800, 1344), (16, 16)),
        ((800, 1344), (25, 42)),
    ):
        for stride, heads, topk in STAGES:
            size = [math.ceil(n / stride) for n in sides]
            triton_builds.assert_builds(capability, launches(size, heads, 32, regions, topk, torch.bfloat16))


DTYPES = [(torch.bfloat16, d) for d in (16, 32, 64, 96, 128)] + [(torch.float32, d) for d in (16, 32, 64, 96, 128)]


@compiles
@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", triton_builds.CAPABILITIES)
@pytest.mark.parametrize(("dtype", "head_dim"), [*DTYPES, (torch.float16, 64)], ids=str)
def test_the_kernels_at_their_limits_compile(capability, dtype, head_dim):
    """Every kernel at every width, its largest blocks; tokens lie beyond the map, for some also not."""
    wanted = []
    for side in (223, 224) if dtype == torch.bfloat16 or head_dim == 128 else (223,):
        for stride, heads, topk in (STAGES[0], STAGES[2]):
            wanted += launches((side // stride,) * 2, heads, head_dim, (7, 7), topk, dtype)
    listed = ["forward", "backward_query", "backward_key"]
    small = ["forward_small", "backward_small"] if (dtype.itemsize, head_dim) in ((2, 16), (2, 32)) else []
    single = ["backward_single"] if dtype == torch.bfloat16 and head_dim <= 64 else []
    assert {launch.kernel.__name__ for launch in wanted} >= {*listed, *small, *single}
    triton_builds.assert_builds(capability, wanted)
