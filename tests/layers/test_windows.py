"""Window partition, masks and attention in windows, against timm's partitions and attention over the whole map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.maxxvit import grid_partition, window_partition

from hybridzoo.layers import WindowAttention
from hybridzoo.layers.windows import attend, fit_window, from_windows, padding_mask, to_windows


@pytest.mark.parametrize(("dilated", "reference"), [(False, window_partition), (True, grid_partition)])
def test_partition_is_a_view_and_merging_a_sum_copies_nothing(dilated, reference):
    x = torch.randn(2, 12, 20, 8)
    windows = to_windows(x, (3, 5), dilated)
    assert windows.shape == (2, 4, 4, 3, 5, 8)
    assert windows.data_ptr() == x.data_ptr()
    assert torch.equal(windows.flatten(0, 2), reference(x, [3, 5]))
    total = windows + torch.zeros(windows.shape)
    merged = from_windows(total, 12, 20, dilated)
    assert merged.data_ptr() == total.data_ptr()
    assert torch.equal(merged, x)


sides = st.integers(1, 17)


@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, rows=st.integers(1, 7), columns=st.integers(1, 7), dilated=st.booleans())
def test_any_size_comes_back_and_masked_tokens_are_the_padding(height, width, rows, columns, dilated):
    x = torch.rand(1, height, width, 2) + 1
    windows = to_windows(x, (rows, columns), dilated)
    assert torch.equal(from_windows(windows, height, width, dilated), x)
    mask = padding_mask(height, width, (rows, columns), dilated)
    real = (windows[..., 0] > 0).flatten(3).flatten(0, 2)
    assert real.all() if mask is None else torch.equal(mask, real)


@settings(max_examples=40, deadline=None)
@given(height=sides, width=sides, dilated=st.booleans())
def test_a_fitted_window_attends_as_the_masked_one(height, width, dilated):
    """Same tokens with the same offsets see each other, whether the window shrinks or tokens are masked."""
    layer = WindowAttention(8, 2, (5, 4)).double().eval()
    x = torch.randn(2, height, width, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(window):
        mask = padding_mask(height, width, window, dilated)
        return from_windows(layer(to_windows(x, window, dilated), mask), height, width, dilated)

    fitted = fit_window(height, width, (5, 4), dilated)
    assert fitted[0] <= min(5, height)
    assert fitted[1] <= min(4, width)
    torch.testing.assert_close(run(fitted), run((5, 4)))


@pytest.mark.parametrize("dilated", [False, True])
def test_padding_is_not_attended_to(dilated):
    """Each window of a map that the window does not divide equals attention over its real tokens alone."""
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, (3, 3)).double()
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    out = from_windows(layer(to_windows(x, (3, 3), dilated), padding_mask(7, 8, (3, 3), dilated)), 7, 8, dilated)
    table = layer.bias.table
    for i, j in [(0, 0), (6, 7), (3, 6), (6, 1)]:
        if dilated:  # three windows along each axis: tokens at distance three
            rows, columns = range(i % 3, 7, 3), range(j % 3, 8, 3)
        else:
            rows, columns = range(i // 3 * 3, min(i // 3 * 3 + 3, 7)), range(j // 3 * 3, min(j // 3 * 3 + 3, 8))
        step = 3 if dilated else 1
        keys = [(y, z) for y in rows for z in columns]
        q = layer.qkv(x[0, i, j])[:8].view(2, 4)
        kv = torch.stack([layer.qkv(x[0, y, z])[8:].view(2, 2, 4) for y, z in keys])
        scores = torch.einsum("hd,khd->hk", q, kv[:, 0]) / 2
        scores = scores + torch.stack([table[:, (y - i) // step + 2, (z - j) // step + 2] for y, z in keys], 1)
        expected = layer.proj(torch.einsum("hk,khd->hd", scores.softmax(-1), kv[:, 1]).flatten())
        torch.testing.assert_close(out[0, i, j], expected)


def test_masks_of_pairs_and_bias_follow_the_windows():
    torch.manual_seed(0)
    qkv = torch.randn(6, 4, 24, dtype=torch.float64)  # batch 2, three windows of four tokens
    bias = torch.randn(2, 4, 4, dtype=torch.float64)
    pairs = torch.rand(3, 4, 4) > 0.5
    pairs |= torch.eye(4, dtype=torch.bool)
    inputs = qkv.chunk(3, dim=-1)
    q, k, v = qkv.view(6, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 2 + bias
    scores = scores.masked_fill(~pairs.repeat(2, 1, 1)[:, None], float("-inf"))
    torch.testing.assert_close(attend(*inputs, 2, bias, pairs), (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    scores = (q @ k.mT / 2).masked_fill(~pairs.repeat(2, 1, 1)[:, None], float("-inf"))
    torch.testing.assert_close(attend(*inputs, 2, mask=pairs), (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_width_must_be_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads; got dim=8, num_heads=3"):
        WindowAttention(8, 3, (7, 7))
