"""Each replacement of an operator of mmcv's compiled extension equals its definition, called through mmcv."""

from __future__ import annotations

import itertools
import math
import re
import sys

import pytest
import torch

pytest.importorskip("mmcv")
from hybridzoo.train import mmcv_ops

mmcv_ops.install()
if not isinstance(sys.modules["mmcv._ext"].__spec__.loader, mmcv_ops._Loader):
    pytest.skip("mmcv has its compiled operators here", allow_module_level=True)

import mmcv.ops as ops  # noqa: E402  after install()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rand(*shape, low=-1.0, high=1.0):
    return torch.rand(*shape, dtype=torch.float64) * (high - low) + low


def check(actual, expected, inputs):
    """Values, and the gradient of a random weighting of them with respect to every input."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    weights = torch.randn_like(expected)
    got = torch.autograd.grad((actual * weights).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum(), inputs)
    for name, (a, b) in enumerate(zip(got, want, strict=True)):
        assert b.abs().max() > 0, f"the test gives input {name} no gradient"
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def hat(plane, y, x):
    """Bilinear interpolation of a zero-padded plane (H, W): a hat function on every pixel."""
    rows, columns = (torch.arange(n, dtype=plane.dtype) for n in plane.shape)
    weight_y = (1 - (y - rows).abs()).clamp(min=0)
    weight_x = (1 - (x - columns).abs()).clamp(min=0)
    return weight_y @ plane @ weight_x


def roi_sample(plane, y, x):
    """RoI Align's interpolation: the border is read up to one pixel outside, 0 beyond."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane.new_zeros(())
    return hat(plane, min(max(y, 0), height - 1), min(max(x, 0), width - 1))


# ---------------------------------------------------------------- the stand-in module


MAPS, BOXES = torch.rand(1, 4, 6, 6), torch.tensor([[0.0, 0.0, 4.0, 4.0]])


@pytest.mark.parametrize(
    ("operator", "call"),
    [
        ("box_iou_rotated", lambda: ops.box_iou_rotated(torch.rand(2, 5), torch.rand(2, 5))),
        ("softnms", lambda: ops.soft_nms(BOXES, torch.ones(1))),
        ("nms_match", lambda: ops.nms_match(torch.rand(2, 5), 0.5)),
        ("roi_pool_forward", lambda: ops.roi_pool(MAPS, torch.rand(1, 5), 2)),
        ("roi_align with pool_mode='max'", lambda: ops.roi_align(MAPS, torch.rand(1, 5), 2, 1.0, 2, "max")),
        ("border_align_forward", lambda: ops.border_align(MAPS, torch.rand(1, 36, 4), 2)),
        ("carafe_forward", lambda: ops.CARAFE(3, 1, 2)(MAPS, torch.rand(1, 9, 12, 12))),
        ("masked_im2col_forward", lambda: ops.MaskedConv2d(4, 4, 3)(MAPS, torch.ones(1, 6, 6))),
        ("psamask_forward", lambda: ops.PSAMask("collect", (3, 3))(torch.rand(1, 9, 6, 6))),
        (
            "softmax_focal_loss_forward",
            lambda: ops.softmax_focal_loss(torch.rand(2, 3, requires_grad=True), torch.tensor([0, 1])),
        ),
    ],
)
def test_an_operator_that_no_recipe_uses_is_named(operator, call):
    with pytest.raises(mmcv_ops.OperatorNotProvided, match=re.escape(repr(operator)) + ".*install onedl-mmcv"):
        call()
    assert issubclass(mmcv_ops.OperatorNotProvided, NotImplementedError)
    assert not hasattr(sys.modules["mmcv._ext"], "__wrapped__")  # dunder names stay absent


def test_importlib_finds_the_replacement_and_install_is_idempotent():
    import importlib.util

    module = sys.modules["mmcv._ext"]
    mmcv_ops.install()
    assert sys.modules["mmcv._ext"] is module
    assert importlib.util.find_spec("mmcv._ext").loader is not None
    assert "hybridzoo" in ops.get_compiler_version()


def test_a_compiled_extension_is_not_replaced(tmp_path, monkeypatch):
    """Where `mmcv._ext` exists, install() must not replace it."""
    (tmp_path / "_ext.py").write_text("REAL = True\n")
    mmcv = sys.modules["mmcv"]
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    monkeypatch.setattr(mmcv, "_ext", None)
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    mmcv_ops.install()
    assert sys.modules["mmcv._ext"].REAL is True
    assert mmcv._ext.REAL is True


# ---------------------------------------------------------------- boxes


def naive_iou(a, b, offset=0):
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    inter = max(width, 0) * max(height, 0)
    area = sum((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    return inter / (area - inter)


def random_boxes(n):
    corner = rand(n, 2, low=0, high=20)
    return torch.cat([corner, corner + rand(n, 2, low=1, high=15)], 1), rand(n, low=0)


@pytest.mark.parametrize(("offset", "threshold"), [(0, 0.5), (1, 0.5), (0, 0.1), (1, 0.3)])
def test_nms(offset, threshold):
    boxes, scores = random_boxes(60)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(naive_iou(boxes[i].tolist(), boxes[j].tolist(), offset) <= threshold for j in kept):
            kept.append(i)
    dets, index = ops.nms(boxes, scores, threshold, offset)
    assert index.tolist() == kept
    assert len(kept) < 60
    torch.testing.assert_close(dets, torch.cat([boxes, scores[:, None]], 1)[kept])
    assert ops.nms(boxes.half(), scores.half(), threshold, offset)[1].numel() > 0


def test_nms_score_threshold_and_empty():
    boxes, scores = random_boxes(30)
    _, index = ops.nms(boxes, scores, 0.5, score_threshold=0.5, max_num=3)
    assert index.numel() == 3
    assert (scores[index] > 0.5).all()
    assert ops.nms(boxes[:0], scores[:0], 0.5)[1].numel() == 0


def test_batched_nms_never_mixes_classes():
    boxes, scores = random_boxes(2)
    boxes[1] = boxes[0]
    assert ops.batched_nms(boxes, scores, torch.tensor([0, 1]), {"type": "nms", "iou_threshold": 0.5})[1].numel() == 2
    assert ops.batched_nms(boxes, scores, torch.tensor([1, 1]), {"type": "nms", "iou_threshold": 0.5})[1].numel() == 1


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_bbox_overlaps(mode, offset):
    a, b = random_boxes(5)[0], random_boxes(7)[0]
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for i, j in itertools.product(range(5), range(7)):
        iou = naive_iou(a[i].tolist(), b[j].tolist(), offset)
        area_a, area_b = (float((c[2] - c[0] + offset) * (c[3] - c[1] + offset)) for c in (a[i], b[j]))
        expected[i, j] = iou if mode == "iou" else iou * (area_a + area_b) / (1 + iou) / area_a
    torch.testing.assert_close(ops.bbox_overlaps(a, b, mode, offset=offset), expected)
    aligned = ops.bbox_overlaps(a, b[:5], mode, aligned=True, offset=offset)
    torch.testing.assert_close(aligned, expected.diagonal())
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    assert ops.bbox_overlaps(point, point).tolist() == [[0.0]]


# ---------------------------------------------------------------- pooling

ROIS = torch.tensor(
    [
        [0, 1.0, 2.0, 13.0, 17.0],
        [1, 0.0, 0.0, 30.0, 21.0],  # the whole map and a little beyond
        [1, 7.3, 5.1, 9.9, 6.2],  # smaller than a bin
        [0, -6.0, -9.0, 4.0, 3.0],  # partly outside
    ],
    dtype=torch.float64,
)


def naive_roi_align(maps, rois, size, scale, ratio, aligned):
    out_h, out_w = size
    shift = 0.5 if aligned else 0.0
    pooled = []
    for index, *corners in rois.tolist():
        x1, y1, x2, y2 = (c * scale - shift for c in corners)
        roi_h, roi_w = y2 - y1, x2 - x1
        if not aligned:
            roi_h, roi_w = max(roi_h, 1.0), max(roi_w, 1.0)
        bin_h, bin_w = roi_h / out_h, roi_w / out_w
        grid_h, grid_w = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for plane in maps[int(index)]:
            for i, j in itertools.product(range(out_h), range(out_w)):
                samples = torch.stack(
                    [
                        roi_sample(plane, y1 + (i + (a + 0.5) / grid_h) * bin_h, x1 + (j + (b + 0.5) / grid_w) * bin_w)
                        for a, b in itertools.product(range(grid_h), range(grid_w))
                    ]
                )
                pooled.append(samples.mean())
    return torch.stack(pooled).view(len(rois), maps.size(1), out_h, out_w)


@pytest.mark.parametrize(("ratio", "aligned"), [(0, True), (2, True), (0, False), (1, False)])
def test_roi_align(ratio, aligned):
    maps = rand(2, 3, 11, 15).requires_grad_()
    layer = ops.RoIAlign((3, 2), spatial_scale=0.5, sampling_ratio=ratio, aligned=aligned)
    check(layer(maps, ROIS), naive_roi_align(maps, ROIS, (3, 2), 0.5, ratio, aligned), [maps])


def test_roi_align_bfloat16_and_no_rois():
    maps, rois = rand(2, 3, 11, 15).bfloat16().requires_grad_(), ROIS.bfloat16()
    pooled = ops.roi_align(maps, rois, (3, 2), 0.5, 2, "avg", True)
    assert pooled.dtype == torch.bfloat16
    exact = naive_roi_align(maps.double(), rois.double(), (3, 2), 0.5, 2, True)
    torch.testing.assert_close(pooled.double(), exact, rtol=2e-2, atol=2e-2)
    pooled.sum().backward()
    assert maps.grad.isfinite().all()
    assert ops.roi_align(maps, rois[:0], (3, 2), 0.5, 2, "avg", True).shape == (0, 3, 3, 2)


# ---------------------------------------------------------------- deformable convolutions and attention


def naive_deform_conv(x, offset, weight, mask, bias, stride, padding, dilation):
    out_channels, per_group, kh, kw = weight.shape
    groups, channels = x.size(1) // per_group, x.size(1)
    offset_groups = offset.size(1) // (2 * kh * kw)
    batch, _, height, width = offset.shape
    result = []
    for b, o, i, j in itertools.product(range(batch), range(out_channels), range(height), range(width)):
        total = bias[o] if bias is not None else x.new_zeros(())
        first = o // (out_channels // groups) * per_group
        for c, u, v in itertools.product(range(per_group), range(kh), range(kw)):
            g = (first + c) // (channels // offset_groups)
            tap = g * kh * kw + u * kw + v
            y = i * stride[0] - padding[0] + u * dilation[0] + offset[b, 2 * tap, i, j]
            z = j * stride[1] - padding[1] + v * dilation[1] + offset[b, 2 * tap + 1, i, j]
            value = hat(x[b, first + c], y, z) * weight[o, c, u, v]
            total = total + (value if mask is None else value * mask[b, tap, i, j])
        result.append(total)
    return torch.stack(result).view(batch, out_channels, height, width)


CONV = [  # stride, padding, dilation, groups, offset groups
    ((1, 1), (1, 1), (1, 1), 1, 1),
    ((2, 1), (0, 2), (1, 2), 2, 1),
    ((1, 2), (2, 1), (2, 1), 1, 2),
]


def conv_inputs(stride, padding, dilation, groups, offset_groups):
    x, weight = rand(1, 4, 5, 6), rand(2, 4 // groups, 3, 2)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((5, 6), (3, 2), stride, padding, dilation, strict=True)
    ]
    # Offsets of more than a pixel, away from whole numbers, where bilinear interpolation has a kink.
    offset = rand(1, offset_groups * 2 * 6, *size, low=0.05, high=0.95) + torch.randint(-2, 2, (1,))
    mask = rand(1, offset_groups * 6, *size, low=0)
    return [t.requires_grad_() for t in (x, offset, weight, mask, rand(2))]


@pytest.mark.parametrize("case", CONV)
def test_deform_conv(case):
    x, offset, weight, *_ = conv_inputs(*case)
    expected = naive_deform_conv(x, offset, weight, None, None, *case[:3])
    check(ops.deform_conv2d(x, offset, weight, *case), expected, [x, offset, weight])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", CONV)
def test_modulated_deform_conv(case, with_bias):
    x, offset, weight, mask, bias = conv_inputs(*case)
    bias = bias if with_bias else None
    expected = naive_deform_conv(x, offset, weight, mask, bias, *case[:3])
    inputs = [x, offset, mask, weight] + [bias] * with_bias
    check(ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *case), expected, inputs)


def test_deform_conv_module_in_bfloat16_trains():
    layer = ops.ModulatedDeformConv2dPack(4, 4, 3, padding=1).bfloat16()
    layer(rand(1, 4, 6, 6).bfloat16()).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in layer.parameters())


def test_ms_deform_attn():
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    shapes = torch.tensor([[4, 5], [2, 3]])
    starts = torch.tensor([0, 20])
    batch, queries, heads, dim, points = 2, 3, 2, 2, 2
    value = rand(batch, 26, heads, dim).requires_grad_()
    # Sample positions away from pixel centres (a kink), some outside the map.
    where = rand(batch, queries, heads, 2, points, 2, low=-0.1, high=1.1).requires_grad_()
    attention = rand(batch, queries, heads, 2, points, low=0).requires_grad_()
    out = []
    for b, q, h, d in itertools.product(range(batch), range(queries), range(heads), range(dim)):
        total = value.new_zeros(())
        for level, p in itertools.product(range(2), range(points)):
            rows, columns = shapes[level].tolist()
            start = starts[level]
            plane = value[b, start : start + rows * columns, h, d].view(rows, columns)
            x, y = where[b, q, h, level, p]
            total = total + attention[b, q, h, level, p] * hat(plane, y * rows - 0.5, x * columns - 0.5)
        out.append(total)
    expected = torch.stack(out).view(batch, queries, heads * dim)
    actual = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, where, attention, 64)
    check(actual, expected, [value, where, attention])


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_sigmoid_focal_loss(gamma, weighted, reduction):
    logits = rand(6, 3, low=-4, high=4).requires_grad_()
    target = torch.tensor([0, 1, 2, 2, 3, 3])  # 3: background
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) if weighted else None
    positive = target[:, None] == torch.arange(3)
    p = 1 / (1 + torch.exp(-logits))
    expected = torch.where(positive, -0.25 * (1 - p) ** gamma * torch.log(p), -0.75 * p**gamma * torch.log(1 - p))
    if weighted:
        expected = expected * torch.cat([weight, weight.new_ones(1)])[target][:, None]
    if reduction == "mean":
        expected = expected.sum() / 6  # mmcv: over rows, not elements
    elif reduction == "sum":
        expected = expected.sum()
    actual = ops.sigmoid_focal_loss(logits, target, gamma, 0.25, weight, reduction)
    if reduction == "none":  # mmcv multiplies grad_output into a gradient per element: any weighting may be checked
        check(actual, expected, [logits])
        return
    torch.testing.assert_close(actual, expected)
    got, want = (torch.autograd.grad(loss, logits)[0] for loss in (actual, expected))
    torch.testing.assert_close(got, want)


def test_focal_loss_survives_extreme_logits():
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], requires_grad=True)
    value = ops.sigmoid_focal_loss(logits, torch.tensor([0, 0]), 0.5, 0.25, None, "sum")
    (grad,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert grad.isfinite().all()
