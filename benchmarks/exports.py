"""Which images the files of `hybridzoo export` take, network by network and format by format: docs/exports.json.

    python -m benchmarks.exports [NAME ...] [--to FORMAT ...]

Exports the smallest network of every structure, with one or two blocks a stage, as the command does, which compares
every file with PyTorch at several sizes and batches. `python -m benchmarks.tables` makes the table of docs/export.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hybridzoo.train.errors import UserError
from hybridzoo.train.export import exporting, sources
from hybridzoo.train.export.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from networks import LEADERS, blocks_a_stage  # noqa: E402  (of the tests)

DATA = ROOT / "docs" / "exports.json"
SIDE = 128  # pixels of the usual image: some graphs begin at 65


@functools.lru_cache(maxsize=1)  # formats share the recorded graphs
def source_of(name: str) -> sources.Source:
    """A small network of a structure. Its parameters all count: of new networks, many are zero."""
    blocks = blocks_a_stage(name, 2 if name.startswith("dinat") else 1)  # every second one is dilated
    source = sources.from_name(name, "none", arguments={"num_classes": 7, **blocks})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in source.network.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0, 0.1, generator=generator)
    sources.fold(source.network)
    source.size = (SIDE, SIDE)
    return source


def cell(name: str, to: str) -> dict[str, Any]:
    """What a file takes, as its metadata say it, and why no more; or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = exporting.export(source_of(name), to, Path(folder, f"network{FORMATS[to].suffix}"))
        except UserError as error:
            return {"refused": str(error)[:300]}
    return {**done.sizes.as_data(), "why": done.why[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="these networks alone")
    parser.add_argument("--to", nargs="+", default=list(FORMATS), choices=FORMATS, help="these formats alone")
    args = parser.parse_args()
    rows = json.loads(DATA.read_text()) if DATA.exists() else {}
    for name in args.names or LEADERS:
        for to in args.to:
            began = time.process_time()
            made = rows.setdefault(name, {})[to] = cell(name, to)
            took = time.process_time() - began
            print(f"{name:20} {to:12} {took:5.1f} s  {json.dumps(made)}", flush=True)
        DATA.write_text(json.dumps({name: rows[name] for name in LEADERS if name in rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
