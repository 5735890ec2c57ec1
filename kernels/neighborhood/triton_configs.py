"""Block sizes, warps and pipeline stages of the Triton kernels, by what they must hold in registers."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

KINDS = ("forward_dense", "forward_tiled", "backward_dense", "backward_query", "backward_key", "backward_bias")


@dataclass(frozen=True)
class Config:
    """How one kernel is cut and compiled. The dense kernels take their block from the group, not from here."""

    queries: int  # per block of scores; also the most tokens a tile of queries has
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """For the compiler. Whether multiplications and additions may fuse is said, because defaults differ."""
        return dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)


# (kernel, padded head_dim, bytes per element). Rows missing here take the next larger head_dim.
# NOT yet measured: chosen from the compiler's reports (registers, shared memory), to be replaced by a tuning run.
TABLE: dict[tuple[str, int, int], Config] = {
    ("forward_dense", 32, 2): Config(64, 64, 4, 2),
    ("forward_dense", 64, 2): Config(64, 64, 4, 2),
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
    ("backward_bias", 32, 2): Config(64, 32, 4, 2),
    ("backward_bias", 64, 2): Config(32, 32, 4, 2),
    ("backward_bias", 128, 2): Config(32, 32, 8, 1),
    ("forward_dense", 32, 4): Config(64, 64, 8, 1),
    ("forward_dense", 64, 4): Config(64, 64, 8, 1),
    ("forward_dense", 128, 4): Config(64, 64, 8, 1),
    ("forward_tiled", 32, 4): Config(32, 32, 4, 2),
    ("forward_tiled", 64, 4): Config(32, 32, 4, 2),
    ("forward_tiled", 128, 4): Config(32, 16, 8, 1),
    ("backward_dense", 32, 4): Config(64, 64, 8, 1),
    ("backward_dense", 64, 4): Config(64, 64, 8, 1),
    ("backward_dense", 128, 4): Config(64, 64, 8, 1),
    ("backward_query", 32, 4): Config(32, 16, 4, 1),
    ("backward_query", 64, 4): Config(32, 16, 4, 1),
    ("backward_query", 128, 4): Config(32, 32, 8, 1),
    ("backward_key", 32, 4): Config(32, 32, 4, 1),
    ("backward_key", 64, 4): Config(16, 32, 4, 1),
    ("backward_key", 128, 4): Config(16, 32, 8, 1),
    ("backward_bias", 32, 4): Config(32, 32, 4, 1),
    ("backward_bias", 64, 4): Config(32, 32, 4, 1),
    ("backward_bias", 128, 4): Config(32, 16, 8, 1),
}


def pick(kind: str, block_d: int, itemsize: int) -> Config:
    """The configuration of kernel `kind` for this padded head_dim (16 to 128) and element size (2 or 4 bytes).

    A tuning run's result, `{"kind,block_d,itemsize": [queries, keys, warps, stages]}` in the JSON file that the
    environment variable HYBRIDZOO_NA2D_CONFIGS names, comes before the table above.
    """
    key = (kind, max(block_d, 32), itemsize)
    return _tuned(os.environ.get("HYBRIDZOO_NA2D_CONFIGS", "")).get(key) or TABLE[key]


@functools.cache
def _tuned(file: str) -> dict[tuple[str, int, int], Config]:
    if not file:
        return {}
    found = {}
    for name, values in json.loads(Path(file).read_text()).items():
        kind, block_d, itemsize = name.split(",")
        found[kind, int(block_d), int(itemsize)] = Config(*values)
    return found
