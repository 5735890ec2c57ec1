"""The head with layers of its own: they go with the pooling and come back with it."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from torch import nn

import hybridzoo  # noqa: F401
from hybridzoo.layers import ConvNormAct, PooledHead


def head_of(**kwargs) -> PooledHead:
    after = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    return PooledHead(ConvNormAct(4, 8), after, 6, **{"num_classes": 3, **kwargs})


@pytest.mark.parametrize("born_dense", [False, True])
def test_removing_the_pooling_removes_layers_and_restoring_it_creates_new_ones(born_dense):
    head = head_of(num_classes=0, pool_type="") if born_dense else head_of()
    names = set(head_of().state_dict())
    x = torch.randn(1, 4, 5, 5)
    if not born_dense:
        nn.init.constant_(head.after[0].weight, float("nan"))
        head.reset(0, "")
    head.eval()
    assert not head.state_dict()
    assert head(x) is x
    pickle.loads(pickle.dumps(head)).reset(5, "max")
    head.reset(5, "max")
    assert set(head.state_dict()) == names
    out = head(x)  # one image: the norm is in evaluation too
    assert out.shape == (1, 5)
    assert out.isfinite().all()


@pytest.mark.parametrize("arguments", [(3, ""), (0, "catavgmax")])
def test_impossible_poolings_are_named_and_change_nothing(arguments):
    head = head_of().eval()
    x = torch.randn(2, 4, 5, 5)
    before = head(x)
    with pytest.raises(ValueError, match="pool_type must"):
        head.reset(*arguments)
    assert torch.equal(head(x), before)


@pytest.mark.parametrize("name", ["efficientvit_msra_m0", "agent_deit_tiny", "agent_pvt_tiny"])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_a_new_classifier_is_where_the_model_is(name, num_classes):
    """Its own head, one of the hosts', timm's; whether or not there was a classifier before."""
    depths = (1,) * (3 if "msra" in name else 4)
    model = timm.create_model(name, depths=depths, num_classes=num_classes).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    model.reset_classifier(5)
    assert model(x).dtype == torch.float64
    model.reset_classifier(0, "")
    model.reset_classifier(5, "avg")
    assert model(x).shape == (1, 5)
    model.to("meta").reset_classifier(2)
    assert model.get_classifier().weight.is_meta
