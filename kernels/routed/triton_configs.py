"""Block sizes, warps and pipeline stages of the routed Triton kernels, chosen by the registers that they need."""

from __future__ import annotations

import re

import torch

from hybridzoo.kernels import tuning
from hybridzoo.kernels.tuning import Config, Key, Table

KINDS = ("forward", "backward_query", "backward_key", "backward_single", "forward_small", "backward_small")

# The largest blocks; smaller regions use smaller blocks and fewer warps (see `triton_impl`).
# Chosen from the compiler's reports (registers, shared memory). For head_dim 32 and 2 bytes, an H100 measured each at
# BiFormer-S's shapes; where another configuration was faster, it is in `kernels/tuned/`. The others are not measured.
# A number of registers is given where the compiler spilled without one.
TABLE: Table = {
    ("forward", 16, 2): Config(64, 64, 4, 2, 255),
    ("forward", 32, 2): Config(64, 64, 4, 2),
    ("forward", 64, 2): Config(64, 64, 4, 2, 255),
    ("forward", 128, 2): Config(64, 32, 4, 2),
    ("backward_query", 32, 2): Config(64, 64, 4, 2, 255),
    ("backward_query", 64, 2): Config(64, 32, 4, 2),
    ("backward_query", 128, 2): Config(32, 16, 8, 1),
    ("backward_key", 16, 2): Config(32, 64, 4, 2, 168),
    ("backward_key", 32, 2): Config(64, 64, 4, 1, 255),
    ("backward_key", 64, 2): Config(16, 64, 4, 2, 255),
    ("backward_key", 128, 2): Config(32, 64, 8, 1, 255),
    ("forward", 32, 4): Config(32, 32, 4, 2),
    ("forward", 64, 4): Config(32, 32, 4, 2, 255),
    ("forward", 128, 4): Config(16, 16, 8, 3),
    ("backward_query", 32, 4): Config(32, 16, 4, 1, 144),
    ("backward_query", 64, 4): Config(32, 16, 4, 1),
    ("backward_query", 128, 4): Config(16, 16, 8, 1),
    ("backward_key", 32, 4): Config(32, 32, 4, 1, 255),
    ("backward_key", 64, 4): Config(16, 32, 4, 1, 255),
    ("backward_key", 128, 4): Config(16, 16, 8, 1, 128),
    ("backward_single", 16, 2): Config(64, 64, 4, 1, 168),
    ("backward_single", 32, 2): Config(64, 64, 4, 1),
    ("backward_single", 64, 2): Config(32, 64, 4, 1),
    ("forward_small", 16, 2): Config(64, 32, 4, 3, 168),
    ("forward_small", 32, 2): Config(64, 32, 4, 3),
    ("backward_small", 32, 2): Config(256, 32, 8, 1, 255),
}


def pick(kind: str, block_d: int, itemsize: int, shape: str = "", device: torch.device | None = None) -> Config:
    """See `tuning.pick`. Each `shape` is tuned on its own: the regions, tokens of a region, and regions attended to."""
    return tuning.pick(TABLE, Key("routed", kind, block_d, itemsize, shape), device)


def candidates(key: Key, default: Config) -> list[Config]:
    """Configurations that a tuning run tries for `key` besides `default`.

    The queries of `backward_small` are always those of the whole map.
    """
    if key.kernel == "forward_small":
        blocks = [
            (64, 32, 4),
            (32, 64, 2),
            (64, 64, 4),
            (16, 64, 1),
            (32, 32, 2),
            (16, 32, 1),
            (128, 64, 8),
            (64, 128, 4),
        ]
        found = [Config(*block, stages) for stages in (3, 2, 4) for block in blocks]
    elif key.kernel == "backward_single":  # its keys are always those of a whole region
        found = [Config(queries, 64, warps, n) for queries in (64, 32) for warps in (4, 8, 2) for n in (1, 2)]
    elif key.kernel == "backward_small":
        keys_warps = [(64, 4), (64, 8), (32, 4), (32, 8), (64, 16), (128, 8)]
        found = [Config(256, keys, warps, stages) for stages in (1, 2) for keys, warps in keys_warps]
    else:
        found = tuning.candidates(default)
        if key.kernel != "backward_key" and key.block_d <= 32 and key.itemsize == 2 and _tokens(key.shape) >= 128:
            found = [Config(128, 64, 8, 2), Config(128, 64, 8, 3), *found]  # as many registers as 64 queries in 4 warps
    return [config for config in found if config != default]


def _tokens(shape: str) -> int:
    """Of one region, in a key's words for a shape."""
    found = re.search(r"regions of (\d+)", shape)
    return int(found[1]) if found else 0
