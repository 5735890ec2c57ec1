"""Golden outputs: results of the published implementations, and the rule that generates their weights.

A fixture depends only on the names and shapes of the *published* state dict, so an implementation that can load a
published checkpoint can be compared with it without ever having one. `golden/<family>/<variant>.json` lists the state
dict; the `.npz` beside it, where there is one, holds logits and samples of the stages' maps, in float64. Networks
amplify random weights: only float64 comparisons mean something.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-9  # relative to the compared tensor's standard deviation


def names(family: str, *, numeric: bool) -> list[str]:
    """Fixtures of a family: all of them, or only those with recorded outputs."""
    return sorted(p.stem for p in (FOLDER / family).glob("*.npz" if numeric else "*.json"))


def structures(family: str, *sizes: str) -> list:
    """Fixtures with numbers; `sizes`, which differ from another one in their sizes only, in exhaustive runs."""
    found = names(family, numeric=True)
    assert {*sizes} < {*found}
    return [pytest.param(name, marks=pytest.mark.exhaustive) if name in sizes else name for name in found]


class Undrawn(TorchFunctionMode):
    """Random numbers are not drawn: what lies in memory stays."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if re.fullmatch(r"(\w+_)?(uniform|normal)_|erfinv_", getattr(function, "__name__", "")):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


def network(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """What `build` makes of the arguments, in float64, for evaluation. Its weights are to be loaded: it has none."""
    with Undrawn():
        return build(*args, **kwargs).double().eval()


def manifest(family: str, name: str) -> dict[str, Any]:
    return json.loads((FOLDER / family / f"{name}.json").read_text())


def published_shapes(family: str, name: str) -> dict[str, Tensor]:
    """The published state dict without its values."""
    return {key: torch.empty(shape, device="meta") for key, shape, _ in manifest(family, name)["state_dict"]}


def numbers(family: str, name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / family / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


_drawn: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # for the last state: often the next has the same ones


def published_state(family: str, name: str) -> dict[str, Tensor]:
    """The published state dict: names and shapes, with deterministic float64 values."""
    global _drawn
    meta = manifest(family, name)
    state, drawn = {}, {}
    few = sum(math.prod(shape) for _, shape, _ in meta["state_dict"]) < 4e7
    for key, shape, dtype in meta["state_dict"]:
        if not dtype.startswith("float"):
            state[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
            continue
        place = key, tuple(shape)
        value = _drawn[place] if place in _drawn else _fill_value(*place)
        if few:
            drawn[place] = value
        for pattern, factor in meta.get("post_fill", ()):
            if re.search(pattern, key):
                value = value * factor
        state[key] = torch.tensor(value) if few else torch.as_tensor(value)
    _drawn = drawn
    return state


def image(shape: list[int]) -> Tensor:
    """Deterministic float64 image batch (B, 3, H, W)."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal(shape))


def sample(feature: Tensor) -> Tensor:
    """The values of an NCHW map that fixtures record, at most 256."""
    flat = feature.contiguous().flatten()
    index = np.sort(np.random.RandomState(1).choice(flat.numel(), size=min(256, flat.numel()), replace=False))
    return flat[torch.from_numpy(index)]


def assert_close(actual: Tensor, expected: Tensor, *, std: float | None = None) -> None:
    """Equal to 1e-9 of the expected tensor's standard deviation."""
    scale = expected.double().std().item() if std is None else std
    error = (actual.detach().double() - expected).abs().max().item() / scale
    assert error < TOLERANCE, f"error {error:.1e} of the standard deviation"


def assert_maps(maps: list[Tensor], data: dict[str, Tensor]) -> None:
    """Every stage's map has the recorded shape and values."""
    assert len(maps) == sum(re.fullmatch(r"stage\d_sample", key) is not None for key in data)
    for i, feature in enumerate(maps):
        assert feature.shape == tuple(data[f"stage{i}_shape"])
        assert_close(sample(feature), data[f"stage{i}_sample"], std=data[f"stage{i}_std"].item())


def assert_outputs(model: nn.Module, family: str, name: str) -> None:
    """A classifier's logits and maps are the recorded ones."""
    data = numbers(family, name)
    with torch.no_grad():
        final, maps = model.forward_intermediates(image(manifest(family, name)["input_shape"]))
        assert_close(model.forward_head(final), data["logits"])
    assert_maps(maps, data)


def _fill_value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) >= 2:  # in place, as there may be millions
        if len(shape) == 3 or shape[0] == 1:  # position embeddings and bias tables
            noise *= 0.1
        else:
            noise /= np.sqrt(np.prod(shape[1:]))
        return noise
    if key.endswith("running_var"):
        return 1.0 + 0.2 * np.abs(noise)
    if key.endswith(("bias", "running_mean")):
        return 0.1 * noise
    return 1.0 + 0.1 * noise  # norm weights, layer scales, temperatures
