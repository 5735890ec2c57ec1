"""Neighborhood attention in Triton: computed by its interpreter (or a GPU, if there is one), compiled for 3 chips."""

from __future__ import annotations

import functools
import math
import random
import re

import pytest
import torch
import triton_builds
from forks import Fork, together
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from triton_tests import (
    DEVICE,
    INTERPRETED,
    assert_as_good,
    compiles,
    computes,
    not_interpreted,
    results,
)

pytest.importorskip("triton", reason="Triton is not installed")

from hybridzoo.kernels import na2d, na2d_packed, triton_common, tuning
from hybridzoo.kernels.neighborhood import operators, reference, triton_configs, triton_impl
from hybridzoo.kernels.neighborhood.given import Maps, Window

CASES = {  # batch, height, width, heads, head_dim, kernel, dilation, bias
    "a group is a window": (2, 7, 7, 1, 16, (7, 7), (1, 1), True),
    "every class is a window, classes of two sizes": (3, 5, 6, 1, 32, (3, 3), (2, 2), True),
    "smaller than the window": (1, 4, 5, 1, 16, (7, 7), (1, 1), True),
    "smaller than the window on one axis": (1, 3, 9, 1, 16, (5, 3), (1, 2), True),
    "more classes than rows": (1, 3, 9, 1, 16, (3, 5), (4, 1), True),
    "partial tiles, head_dim no power of two": (1, 9, 10, 1, 24, (3, 5), (1, 1), True),
    "no bias": (1, 10, 4, 1, 64, (7, 3), (1, 1), False),
    "a group is a window, no bias": (1, 6, 6, 1, 16, (3, 3), (2, 2), False),
    "dilated": (1, 11, 8, 1, 16, (3, 3), (2, 1), True),
}


@pytest.fixture(autouse=True)
def _fresh_plans():
    """What a test changes of the tables, or of the chip, is not kept for others."""
    tuning.forget()
    yield
    tuning.forget()


def leaves(batch, height, width, heads, head_dim, kernel, bias, dtype):
    """Query, key, value and (or None) bias on the device, leaves, in `dtype`; the table stays float32."""
    qkv = [torch.randn(batch, height, width, heads, head_dim).to(DEVICE, dtype).requires_grad_() for _ in range(3)]
    rpb = torch.randn(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1).to(DEVICE).requires_grad_() if bias else None
    return [*qkv, rpb]


def assert_as_good_as_the_definition(tensors, kernel, dilation, scale=0.3, packed=False):
    attend = (lambda q, k, v, *rest, **more: na2d_packed(torch.stack((q, k, v), 3), *rest, **more)) if packed else na2d
    assert_as_good(
        lambda *t: attend(*t[:3], kernel, dilation, rpb=t[3], scale=scale, impl="triton"),
        lambda *t: reference.na2d(*t, kernel, dilation, scale),
        tensors,
    )


@computes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients(case, dtype):
    *shape, kernel, dilation, bias = CASES[case]
    tensors = leaves(*shape, kernel, bias, dtype)
    if reason := triton_common.unsupported(tensors[0]):
        pytest.skip(reason)
    if INTERPRETED and dtype == torch.float16 and "a group" not in case:
        pytest.skip("slow to interpret; float32 covers the shape")
    torch.manual_seed(0)
    assert_as_good_as_the_definition(tensors, kernel, dilation, packed=dtype == torch.float16)


def smallest_blocks(monkeypatch):
    smallest = dict.fromkeys(triton_configs.TABLE, triton_configs.Config(16, 16, 1, 1))
    monkeypatch.setattr(triton_configs, "TABLE", smallest)
    monkeypatch.setattr(triton_configs, "OWN", (16,))


@computes
@pytest.mark.parametrize("seed", range(100) if DEVICE == "cuda" else (34, 6, 7, 79, 82))  # some leave a query one key
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)  # whole kernels, and tiled ones
def test_any_shape(seed, dtype, monkeypatch):
    """With the smallest blocks, so that small maps have many tiles and many blocks of keys."""
    smallest_blocks(monkeypatch)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kernel = draw.choice([3, 3, 5, 7]), draw.choice([3, 3, 5, 7])
    dilation = draw.choice([1, 1, 2]), draw.choice([1, 2, 3])
    height, width = draw.randint(1, 12), draw.randint(1, 12)
    tensors = leaves(1, height, width, 1, 32, kernel, True, dtype)
    assert_as_good_as_the_definition(tensors, kernel, dilation, packed=seed % 2 == 1)


@computes
def test_a_class_may_have_no_token_in_a_tile(monkeypatch):
    """Two classes of 3 and 2 tokens, in 3 tiles."""
    cut = triton_configs.Cut((1, 2), (3, 1), triton_configs.Config(16, 16, 1, 1))
    monkeypatch.setattr(triton_configs, "square", lambda *_: cut)
    torch.manual_seed(0)
    assert_as_good_as_the_definition(leaves(1, 5, 2, 1, 16, (3, 3), True, torch.float32), (3, 3), (2, 1))


@computes
@pytest.mark.parametrize("scale", [-0.7, 0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["whole", "tiled"])
def test_any_scale(scale, dtype):
    """The whole kernels divide the bias by it, and take the maximum over products."""
    torch.manual_seed(0)
    tensors = leaves(1, 4, 7, 1, 32, (5, 3), True, dtype)
    assert_as_good_as_the_definition(tensors, (5, 3), (1, 2), scale=scale)


@computes
@pytest.mark.parametrize(
    ("kernel", "dilation", "dtype"),
    [((3, 3), (1, 1), torch.float32), ((5, 5), (1, 2), torch.float32), ((3, 3), (1, 1), torch.float16)],
    ids=["tiled", "dense", "whole"],
)
def test_kernels_read_only_their_inputs_and_write_all_outputs(kernel, dilation, dtype):
    """Views of a packed projection inside a larger NaN buffer, and NaN in every fresh allocation."""
    torch.manual_seed(0)
    buffer = torch.full((2, 7, 8, 3, 3, 29), torch.nan, device=DEVICE, dtype=dtype)
    packed = buffer[:, 1:6, 1:7, :, 1:, 3:27]
    packed.copy_(torch.randn(packed.shape))
    near = 1e-5 if dtype == torch.float32 else 5e-3
    inside = packed.detach().requires_grad_()
    rpb = torch.randn(2, 2 * kernel[0] - 1, 2 * kernel[1] - 1, device=DEVICE, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()  # the trap is set
        out = na2d(*inside.unbind(3), kernel, dilation, rpb=rpb, impl="triton")
        grads = torch.autograd.grad(out.sin().sum(), (inside, rpb))
    finally:
        torch.use_deterministic_algorithms(False)
    exact = packed.detach().cpu().double().requires_grad_()
    table = rpb.detach().cpu().double().requires_grad_()
    expected = reference.na2d(*exact.unbind(3), table, kernel, dilation, 24**-0.5)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=near, atol=near)
    for grad, e in zip(grads, torch.autograd.grad(expected.sin().sum(), (exact, table)), strict=True):
        torch.testing.assert_close(grad.cpu().double(), e, rtol=near, atol=near)


@computes
@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "dtype", "bias"),
    [
        ((5, 4), (3, 3), (2, 2), torch.float32, True),
        ((5, 4), (3, 3), (2, 2), torch.float32, False),
        ((4, 9), (5, 3), (1, 2), torch.float32, True),
        ((4, 9), (5, 3), (1, 2), torch.float16, True),
        ((4, 9), (5, 3), (1, 2), torch.float16, False),
    ],
    ids=["dense", "dense, no bias", "tiled", "whole", "whole, no bias"],
)
def test_fill_equals_a_map_that_has_these_tokens(size, kernel, dilation, dtype, bias):
    torch.manual_seed(0)
    *qkv, rpb = leaves(1, *size, 2, 16 if dtype == torch.float32 else 32, kernel, bias, dtype)
    fill = torch.randn(2, 2, qkv[0].shape[4], device=DEVICE, requires_grad=True)
    assert_as_good(
        lambda q, k, v, rpb, fill: na2d(q, k, v, kernel, dilation, rpb=rpb, fill=fill, scale=0.3, impl="triton"),
        lambda q, k, v, rpb, fill: reference.na2d(q, k, v, rpb, kernel, dilation, 0.3, fill),
        [*qkv, rpb, fill],
    )


@computes
@pytest.mark.parametrize("bias", [True, False])
def test_operators_are_well_formed(bias):
    torch.manual_seed(0)
    *qkv, rpb = leaves(1, 2, 3, 1, 16, (3, 3), bias, torch.float32)
    where = [3, 3], [1, 1], 0.3, "triton"
    torch.library.opcheck(operators.na2d, (*qkv, rpb, *where, False))
    tensors = [None if t is None else t.detach() for t in (*qkv, rpb)]
    out, lse = operators.na2d(*tensors, *where, False)
    for want_rpb in {False, bias}:
        args = (torch.randn_like(out), *tensors, out, lse, None, *where, want_rpb)
        torch.library.opcheck(operators.na2d_backward, args)


def test_a_frozen_bias_needs_no_kernel():
    *inputs, grad = (torch.empty(1, 9, 9, 2, 32, device="meta") for _ in range(5))
    lse, rpb = torch.empty(1, 9, 9, 2, device="meta"), torch.empty(2, 5, 5, device="meta")
    window = Window((3, 3), (1, 1), 0.3)

    def kernels(*maps):
        grad, query, key, value, out = maps
        arguments = grad, Maps(query, key, value), rpb, out, lse, None, window, Maps(grad, grad, grad)
        return (triton_impl.backward_launches(*arguments, want_rpb)[0] for want_rpb in (False, True))

    frozen, trained = kernels(grad, *inputs)
    assert [n.kernel.__name__ for n in trained] == [*(n.kernel.__name__ for n in frozen), "backward_bias"]  # float32
    frozen, trained = kernels(*(t.half() for t in (grad, *inputs)))
    assert [n.kernel.__name__ for n in trained] == [*(n.kernel.__name__ for n in frozen), "bias_table"]
    assert [n.arguments["WANT_BIAS"] for n in (frozen[0], trained[0])] == [False, True]


def allow_and_print(allow):
    allow()
    print(*(triton_common.precision(torch.empty(1, dtype=dtype)) for dtype in (torch.float32, torch.float16)))


@not_interpreted
def test_float32_products_follow_the_tf32_setting_of_pytorch(tmp_path):
    """In a process for each way: once one way to allow TF32 was used, PyTorch refuses others."""
    backends = torch.backends
    ways = (
        lambda: None,
        lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(backends, "fp32_precision", "tf32"),
        lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
        lambda: torch.set_float32_matmul_precision("high"),
    )
    forks = [Fork(functools.partial(allow_and_print, way), tmp_path / str(i)) for i, way in enumerate(ways)]
    assert together(*forks) == ["ieee ieee\n", *["tf32 ieee\n"] * 4]


sides = st.integers(1, 40)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(sides, sides), kernel=st.tuples(*[st.sampled_from([3, 5, 7, 13])] * 2),
    dilation=st.tuples(*[st.integers(1, 5)] * 2), block_d=st.sampled_from([16, 32, 64, 128]),
    kind=st.sampled_from(triton_configs.WHOLE),
)  # fmt: skip
def test_a_tile_and_its_keys_fit_their_block(size, kernel, dilation, block_d, kind):
    """Counted from the definition's tables; and no token is left out."""
    axes = [triton_configs.Axis.of(*axis) for axis in zip(size, kernel, dilation, strict=True)]
    cut = triton_configs.whole(kind, *axes, block_d, 2, torch.device("cpu"))
    assume(cut is not None)
    met = []
    for length, k, d, tile, tiles in zip(size, kernel, dilation, cut.tile, cut.tiles, strict=True):
        seen = [keys for keys, _ in reference.axis_table(length, k, d)]
        by = [[q for q in range(length) if i in seen[q]] for i in range(length)] if "key" in kind else seen
        most = 0
        for residue in range(min(d, length)):
            group = list(range(residue, length, d))
            assert len(group) <= tile * tiles
            for i in range(tiles):
                part = group[i * len(group) // tiles : (i + 1) * len(group) // tiles]
                assert len(part) <= tile
                if span := [place // d for member in part for place in by[member]]:
                    most = max(most, max(span) - min(span) + 1)
        met.append(most)
    own, other = cut.config.queries, cut.config.keys
    if "key" in kind:
        own, other = other, own
    assert math.prod(cut.tile) <= own
    assert math.prod(met) <= other


def test_offsets_from_a_program_s_first_image_have_32_bits():
    """Images may lie far apart in memory: then a program takes fewer of them."""
    shape, apart = (64, 9, 9, 1, 32), 2**28
    maps = [torch.empty_strided(shape, (apart, 288, 32, 32, 1), dtype=torch.float16, device="meta")] * 3
    out, lse = torch.empty(shape, dtype=torch.float16, device="meta"), torch.empty(shape[:4], device="meta")
    window = Window((7, 7), (1, 1), 0.3)
    backward, _ = triton_impl.backward_launches(out, Maps(*maps), None, out, lse, None, window, Maps(out, out, out))
    for launch in (triton_impl.forward_launch(Maps(*maps), None, out, lse, window), *backward):
        assert launch.kernel.__name__ in triton_configs.WHOLE
        assert 1 <= launch.arguments["images"] < 2**31 // apart


def test_few_tiles_cover_a_small_map():
    """At both ends of a map, few places see many: tiles of 3 and 4 keys are seen by 10 of 14 places at most."""
    axis = triton_configs.Axis.of(14, 7, 1)
    cuts = {kind: triton_configs.whole(kind, axis, axis, 32, 2, torch.device("cpu")) for kind in triton_configs.HELD}
    tiles = {kind: math.prod(cut.tiles) for kind, cut in cuts.items()}
    assert tiles == dict(forward_whole=4, backward_query_whole=14, backward_key_whole=16)


@pytest.mark.parametrize(("side", "dilation"), [(56, 1), (28, 4), (14, 1), (29, 2)])
def test_the_candidates_of_a_tuning_run_can_run(side, dilation):
    with tuning.asked() as asked:
        default = launches(side, 4, 32, 7, dilation, torch.bfloat16)
    assert len(asked) == len(default) - 1  # the last one sums what another left
    for key, config in asked.items():
        tried = triton_configs.candidates(key, config)
        assert len(set(tried)) == len(tried) >= 4
        assert config not in tried
        for one in tried:
            with tuning.trying({key: one}):
                options = [n.options for n in launches(side, 4, 32, 7, dilation, torch.bfloat16)]
            assert one.options in options


@computes
def test_query_key_and_value_may_have_different_strides():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 5, 2, 16, device=DEVICE)
    other = k.transpose(1, 3).contiguous().transpose(1, 3), v.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(na2d(q, *other, 3, impl="triton"), na2d(q, k, v, 3, impl="triton"))


@computes
def test_a_batch_is_summed_completely_for_any_images_per_program(monkeypatch):
    """Images share programs in three kernels; an odd batch leaves the last program fewer."""
    monkeypatch.setattr(triton_impl, "_images", lambda *_: 2)
    torch.manual_seed(0)
    for width, dtype in ((3, torch.float32), (4, torch.float32), (4, torch.float16)):  # dense, tiled, whole
        assert_as_good_as_the_definition(leaves(3, 3, width, 1, 32, (3, 3), True, dtype), (3, 3), (1, 1))


@computes
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
@pytest.mark.parametrize("dilation", [1, 8])
def test_gradients_are_the_same_bits_every_time(dilation):
    tensors = leaves(16, 56, 56, 2, 32, (7, 7), True, torch.bfloat16)
    grad = torch.randn_like(tensors[0])
    attend = lambda *t: na2d(*t[:3], 7, dilation, rpb=t[3], impl="triton")  # noqa: E731
    first, second = (results(attend, tensors, grad) for _ in range(2))
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


def launches(height, heads, head_dim, kernel, dilation, dtype, bias=True, fill=False):
    """What a training step on 128 images of a packed projection launches. Nothing is allocated.

    With a `fill` the log-sum-exp has a gradient.
    """
    shape = (128, height, height, heads, head_dim)
    maps = Maps(*torch.empty(*shape[:3], 3, *shape[3:], dtype=dtype, device="meta").unbind(3))
    rpb = torch.empty(heads, 2 * kernel - 1, 2 * kernel - 1, device="meta") if bias else None
    out, lse = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(shape[:4], device="meta")
    window = Window((kernel, kernel), (dilation, dilation), head_dim**-0.5)
    forward = triton_impl.forward_launch(maps, rpb, out, lse, window)
    grad_lse = torch.empty_like(lse) if fill else None  # without a fill the gradients of the three are packed too
    into = Maps(out, out, out) if fill else maps
    backward, _ = triton_impl.backward_launches(out, maps, rpb, out, lse, grad_lse, window, into)
    return [forward, *backward]


def pretend(capability, monkeypatch):
    """That the chip were of this capability, for what is cut differently by it."""
    monkeypatch.setattr(triton_configs, "capability", lambda device: divmod(capability, 10))


# The most instructions of a warp for a tile of an image, for dilations 1 and 8: 3 % more than when they were counted.
LOOPS = (
    dict(forward_whole=485, backward_query_whole=320, backward_key_whole=552),
    dict(forward_whole=423, backward_dense=586),
)


@compiles
@pytest.mark.parametrize("capability", triton_builds.CAPABILITIES)
def test_the_kernels_of_dinat_compile(capability, monkeypatch):
    """Half precision, head_dim 32, kernel 7; at 224 pixels the first stage alternates dilation 1 and 8."""
    pretend(capability, monkeypatch)
    tiled, dense = (launches(56, 2, 32, 7, dilation, torch.bfloat16) for dilation in (1, 8))
    expected = {"forward_whole", "backward_query_whole", "backward_key_whole", "bias_table"}
    assert {launch.kernel.__name__ for launch in tiled} == expected
    loops = LOOPS if capability == 90 else ({}, {})
    triton_builds.assert_builds(capability, tiled, loops[0])
    triton_builds.assert_builds(capability, dense, loops[1])
    triton_builds.assert_builds(capability, launches(14, 8, 32, 7, 1, torch.bfloat16))
    filled = [n for dilation in (1, 8) for n in launches(56, 2, 32, 7, dilation, torch.bfloat16, fill=True)]
    changed = [n for n in filled if n.arguments.get("GRAD_LSE")]
    assert len(changed) == 2
    triton_builds.assert_builds(capability, changed)


# Every kernel at every width. The size of the neighborhood changes a few constants only, so one is enough for each.
LIMITS = {
    torch.bfloat16: {16: 3, 32: 13, 64: 7, 96: 7, 128: 13},
    torch.float32: {16: 13, 32: 7, 64: 3, 96: 7, 128: 3},
    torch.float16: {64: 3},
}
WITHOUT_BIAS = [(torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float32, 128)]


@compiles
@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", triton_builds.CAPABILITIES)
@pytest.mark.parametrize(("dtype", "head_dim"), [(t, d) for t, row in LIMITS.items() for d in row], ids=str)
def test_the_kernels_at_their_limits_compile(capability, dtype, head_dim, monkeypatch):
    pretend(capability, monkeypatch)
    wanted = []
    for bias in (True, False) if (dtype, head_dim) in WITHOUT_BIAS else (True,):
        wanted += launches(56, 2, head_dim, LIMITS[dtype][head_dim], 1, dtype, bias)
        for side in (7, 5, 3):  # groups that are a window
            found = launches(side, 2, head_dim, side, 1, dtype, bias)
            wanted += [n for n in found if n.kernel.__name__ in (*triton_configs.WHOLE, "bias_table")]
    triton_builds.assert_builds(capability, wanted)
