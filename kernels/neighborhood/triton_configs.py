"""Block sizes, warps and pipeline stages of the Triton kernels, by what they must hold in registers."""

from __future__ import annotations

import torch

from hybridzoo.kernels import tuning
from hybridzoo.kernels.tuning import Config, Key, Table

KINDS = ("forward_dense", "forward_tiled", "backward_dense", "backward_query", "backward_key", "backward_bias")


# NOT yet measured: chosen from the compiler's reports (registers, shared memory), to be replaced by a tuning run.
# The dense kernels take their block from the dilation group, not from here; one of at most 32 tokens takes the row
# "..._small" where there is one. Numbers of registers are there where the compiler, left to itself, spilled.
TABLE: Table = {
    ("forward_dense", 16, 2): Config(64, 64, 4, 2, 128),
    ("forward_dense_small", 32, 2): Config(32, 32, 4, 2, 104),
    ("forward_dense", 32, 2): Config(64, 64, 4, 2),
    ("forward_dense", 64, 2): Config(64, 64, 4, 2, 168),
    ("forward_dense", 128, 2): Config(64, 64, 4, 1),
    ("forward_tiled", 32, 2): Config(64, 32, 4, 3),
    ("forward_tiled", 64, 2): Config(64, 32, 4, 3),
    ("forward_tiled", 128, 2): Config(64, 16, 4, 2),
    ("backward_dense", 32, 2): Config(64, 64, 4, 2),
    ("backward_dense", 64, 2): Config(64, 64, 8, 1),
    ("backward_dense", 128, 2): Config(64, 64, 8, 1),
    ("backward_query", 32, 2): Config(64, 32, 4, 2),
    ("backward_query", 64, 2): Config(64, 32, 4, 2),
    ("backward_query", 128, 2): Config(64, 16, 4, 1),
    ("backward_key", 32, 2): Config(32, 64, 4, 2),
    ("backward_key", 64, 2): Config(16, 64, 4, 2),
    ("backward_key", 128, 2): Config(32, 64, 8, 1),
    ("backward_bias", 16, 2): Config(32, 32, 4, 2),
    ("backward_bias", 32, 2): Config(64, 32, 4, 2),
    ("backward_bias", 64, 2): Config(32, 16, 4, 2),
    ("backward_bias", 128, 2): Config(16, 32, 4, 1),
    ("forward_dense", 32, 4): Config(64, 64, 8, 1),
    ("forward_dense", 64, 4): Config(64, 64, 8, 1),
    ("forward_dense", 128, 4): Config(64, 64, 8, 1),
    ("forward_tiled", 32, 4): Config(32, 32, 4, 2),
    ("forward_tiled", 64, 4): Config(32, 32, 4, 2),
    ("forward_tiled", 128, 4): Config(32, 16, 8, 1),
    ("backward_dense", 32, 4): Config(64, 64, 8, 1),
    ("backward_dense", 64, 4): Config(64, 64, 8, 1),
    ("backward_dense", 128, 4): Config(64, 64, 8, 1),
    ("backward_query", 32, 4): Config(32, 16, 4, 1, 144),
    ("backward_query", 64, 4): Config(32, 16, 4, 1),
    ("backward_query", 128, 4): Config(16, 16, 8, 1),
    ("backward_key", 32, 4): Config(32, 32, 4, 1),
    ("backward_key", 64, 4): Config(16, 32, 4, 1),
    ("backward_key", 128, 4): Config(16, 32, 8, 1),
    ("backward_bias", 32, 4): Config(32, 32, 4, 1),
    ("backward_bias", 64, 4): Config(32, 32, 4, 1),
    ("backward_bias", 128, 4): Config(32, 16, 8, 1),
}


def pick(
    kind: str,
    block_d: int,
    itemsize: int,
    tokens: int | None = None,
    shape: str = "",
    device: torch.device | None = None,
) -> Config:
    """See `tuning.pick`. `tokens` is the block of a dense kernel; `shape` tells apart what is tuned apart."""
    if tokens is not None and tokens <= 32 and (f"{kind}_small", block_d, itemsize) in TABLE:
        kind = f"{kind}_small"
    return tuning.pick(TABLE, Key("na2d", kind, block_d, itemsize, shape), device)


def candidates(key: Key, default: Config) -> list[Config]:
    """What a tuning run tries for `key` beside `default`. Dense kernels take their blocks from elsewhere."""
    return tuning.candidates(default, blocks="dense" not in key.kernel)
