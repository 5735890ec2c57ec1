"""Relative position tables, positions from coordinates, and what evaluation remembers of both."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from hybridzoo.layers import CoordinateBias, CoordinateEmbedding, EvalCache, RelativePositionBias, eval_cache
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


class Counted(EvalCache):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.computed = 0

    def forward(self, key: int = 0) -> torch.Tensor:
        def compute():
            self.computed += 1
            return self.weight * 2

        return self.cached(key, compute)


def test_evaluation_computes_once():
    module = Counted().eval()
    with torch.no_grad():
        assert module() is module()
        assert module.computed == 1
        module(1)
        assert module.computed == 2
    with torch.inference_mode():
        module()
    assert module.computed == 2
    assert set(module.state_dict()) == {"weight"}


def _step(module):
    module.weight.grad = torch.ones(2)
    torch.optim.SGD(module.parameters(), lr=1.0).step()


def _fused_step(module):
    """Writes without counting a version."""
    module.weight.grad = torch.ones(2)
    version = module.weight._version
    torch.optim.AdamW(module.parameters(), lr=1.0, fused=True).step()
    assert module.weight._version == version


def _data(module):
    module.weight.data.mul_(3)
    module.eval()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({"weight": torch.full((2,), 5.0)}),
        lambda m: m.weight.mul_(7),
        _step,
        _fused_step,
        lambda m: m.to(torch.float64),
        lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(2))),
        _data,
    ],
    ids=["load", "write", "step", "fused step", "dtype", "replace", "data then eval()"],
)
def test_changed_weights_are_noticed(change):
    module = Counted().eval()
    with torch.no_grad():
        module()
        change(module)
        torch.testing.assert_close(module(), module.weight * 2)
        assert module.computed == 2


def test_other_weights_at_the_same_address_are_noticed():
    """What a loop of `functional_call` frees is given to its next tensor, which has version 0 as well."""
    module, memory = Counted().eval(), torch.zeros(2).numpy()
    with torch.no_grad():
        for value in range(4):
            memory[:] = value
            weight = torch.from_numpy(memory)
            assert functional_call(module, {"weight": weight}, ()).tolist() == [2 * value, 2 * value]
            module.weight = nn.Parameter(weight)
            assert module().tolist() == [2 * value, 2 * value]


def test_autocast_has_results_of_its_own():
    module = CoordinateBias(2).eval()
    with torch.no_grad():
        expected = module((3, 4))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module((3, 4))
            assert module((3, 4)) is rounded
        assert module((3, 4)) is expected
    assert not torch.equal(rounded, expected)


def test_replicas_keep_nothing():
    """They share the original's attributes; their weights are no parameters."""
    module = Counted().eval()
    with torch.no_grad():
        for value in (1.0, 2.0):
            replica = module._replicate_for_data_parallel()
            replica.weight = torch.full((2,), value)
            assert replica().tolist() == [2 * value, 2 * value]
    assert not module._results


def test_weights_inside_transforms_are_computed_with():
    module, weights = Counted().eval(), torch.randn(3, 2)
    with torch.no_grad():
        out = torch.func.vmap(lambda weight: functional_call(module, {"weight": weight}, ()))(weights)
    torch.testing.assert_close(out, weights * 2)


@pytest.mark.parametrize("change", [lambda m: m.load_state_dict(m.state_dict()), lambda m: m.double()])
def test_weights_can_be_swapped(change, monkeypatch):
    """PyTorch refuses to swap what is referred to weakly."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    module = Counted().eval()
    with torch.no_grad():
        module()
        change(module)
        torch.testing.assert_close(module(), module.weight * 2)


def test_a_change_of_type_and_back_is_noticed():
    """Whatever address the weights end at: half precision rounded them."""
    module = Counted().eval()
    with torch.no_grad():
        module.weight.fill_(1 / 3)
        module()
        assert module._results
        module.half().float()
        assert not module._results
        assert torch.equal(module(), module.weight * 2)


def test_nothing_is_kept_where_gradients_flow_or_while_training():
    module = Counted().eval()
    module().sum().backward()
    module().sum().backward()
    assert module.weight.grad.tolist() == [4.0, 4.0]
    with torch.no_grad():
        module.train()
        module()
        module()
    assert module.computed == 4


def test_a_result_made_in_inference_mode_serves_a_later_backward():
    module = Counted().eval().requires_grad_(False)
    with torch.inference_mode():
        module()
    x = torch.ones(2, requires_grad=True)
    (x * module()).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
    assert module.computed == 1


def test_copies_and_pickles_start_empty():
    module = Counted().eval()
    with torch.no_grad():
        module()
        assert module._results
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert not twin._results
            torch.testing.assert_close(twin(), module())


def test_memory_is_bounded_by_bytes(monkeypatch):
    """The oldest results go; what alone is too large is not kept, and drives nothing out."""
    monkeypatch.setattr(eval_cache, "BUDGET", 5 * 8)
    module = Counted().eval()
    with torch.no_grad():
        for key in range(7):
            module(key)
        assert [key for key, _ in module._results] == [2, 3, 4, 5, 6]
        assert module(3) is module(3)
        large = [torch.ones(8), (torch.ones(3),)]
        assert module.cached("large", lambda: large) is large
        assert [key for key, _ in module._results] == [2, 3, 4, 5, 6]
        module.weight.mul_(2)
        module(2)
        assert [key for key, _ in module._results] == [3, 4, 5, 6, 2]  # the youngest now
