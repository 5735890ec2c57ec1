"""Relative position tables, and positions from coordinates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.layers import CoordinateBias, CoordinateEmbedding, RelativePositionBias
from hybridzoo.layers.relative_position import convert_swin_table, gather_bias, resize_table


@pytest.mark.parametrize("window", [(4, 3), (2, 3), (1, 1)])
def test_bias_is_the_entry_at_key_minus_query(window):
    table = torch.randn(2, 7, 5)  # of a 4 x 3 window
    bias = gather_bias(table, window).view(2, *window, *window)
    for i in range(window[0]):
        for j in range(window[1]):
            for x in range(window[0]):
                for y in range(window[1]):
                    assert torch.equal(bias[:, i, j, x, y], table[:, x - i + 3, y - j + 2])


def test_window_larger_than_the_table_is_named():
    with pytest.raises(ValueError, match=r"window \(5, 3\) is larger than the table's, \(4, 3\)"):
        gather_bias(torch.randn(2, 7, 5), (5, 3))


def test_swin_tables_are_query_minus_key():
    published = torch.randn(7 * 5, 2)
    bias = gather_bias(convert_swin_table(published, (4, 3)), (4, 3))
    coords = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(3), indexing="ij")).flatten(1)
    offset = coords[:, :, None] - coords[:, None] + torch.tensor([3, 2])[:, None, None]
    assert torch.equal(bias, published[offset[0] * 5 + offset[1]].permute(2, 0, 1))


def test_tables_of_another_window_are_resized_while_loading():
    small, large = RelativePositionBias(2, (7, 7)), RelativePositionBias(2, (12, 10))
    state = small.state_dict()
    large.load_state_dict(state)
    expected = F.interpolate(small.table[None], (23, 19), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(large.table, expected)
    assert state["table"].shape == (2, 13, 13)
    assert not torch.equal(resize_table(small.table, (12, 10), "geometric"), expected)
    assert torch.equal(resize_table(small.table, (7, 7)), small.table)
    with pytest.raises(RuntimeError, match="size mismatch"):
        RelativePositionBias(3, (12, 10)).load_state_dict(state)
    with pytest.raises(ValueError, match="resize must be one of bilinear, bicubic, geometric; got 'area'"):
        RelativePositionBias(2, (7, 7), resize="area")


def test_coordinate_bias_is_the_published_formula_on_rectangles_too():
    torch.manual_seed(0)
    bias = CoordinateBias(2)
    rows, columns, extra = 3, 5, 2
    out = bias((rows, columns), extra)
    assert out.shape == (2, 17, 17)
    assert not out[:, :2].any()
    assert not out[:, :, :2].any()

    def spaced(offset: int, side: int) -> float:
        u = torch.tensor(8.0 * offset / (side - 1))
        return (u.sign() * torch.log2(u.abs() + 1) / 3).item()

    for q in (0, 7, 14):
        for k in (0, 4, 11):
            offset = (q // columns - k // columns, q % columns - k % columns)
            point = torch.tensor([spaced(offset[0], rows), spaced(offset[1], columns)])
            torch.testing.assert_close(out[:, 2 + q, 2 + k], 16 * torch.sigmoid(bias.mlp(point)))


def test_coordinate_embedding_counts_from_the_middle():
    torch.manual_seed(0)
    embedding = CoordinateEmbedding(6)
    points = torch.tensor([[r, c] for r in (-1.0, 0.0, 1.0) for c in (-1.0, -0.5, 0.0, 0.5)])
    torch.testing.assert_close(embedding((3, 4)), embedding.mlp(points))
    assert embedding((1, 1)).isfinite().all()
