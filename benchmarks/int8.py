"""What int8 costs: top-1 on the digits and size of the ONNX files of `hybridzoo export --int8`: docs/int8.json.

    python -m benchmarks.int8 [--work FOLDER]

Trains two networks for one epoch, where the folder has no checkpoint of theirs, and runs the files by ONNX Runtime.
`python -m benchmarks.tables` makes the table of docs/export.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from hybridzoo.train import trained_verbs
from hybridzoo.train.digits import digits_root
from hybridzoo.train.export import exporting, int8, runs, sources
from hybridzoo.train.export.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import one_line  # noqa: E402

DATA = ROOT / "docs" / "int8.json"
NETWORKS = ("ravlt_tiny", "litv2_small")
WAYS = ("float32", "weights", "dynamic")
SIDE = 32  # pixels


def row(checkpoint: Path, way: str) -> dict[str, Any]:
    """Export a run's checkpoint in one way, and see how many of the validation digits the file gets right."""
    file, loaded = trained_verbs.find_trained(None, str(checkpoint), None)
    source = runs.from_run(loaded, file)
    sources.fold(source.network)
    change = 0.0 if way == "float32" else int8.quantize(source, way)
    out = checkpoint.parent / f"{way}.onnx"
    done = exporting.export(source, "onnx", out, dynamic=False, force=True, tolerance=int8.tolerance(way, change))
    run, facts = FORMATS["onnx"].open(out), source.metadata["input"]
    look = create_transform(
        (3, *source.size), mean=facts["mean"], std=facts["std"],
        interpolation=facts["interpolation"], crop_pct=facts["crop_pct"],
    )  # fmt: skip
    images = ImageFolder(digits_root("classification") / "val", look)
    right = sum(int((run(x)[0].argmax(1) == y).sum()) for x, y in DataLoader(images, batch_size=64))
    size = sum(part.stat().st_size for part in done.files) / 1e6
    return {"top1": round(100 * right / len(images), 2), "images": len(images), "mb": round(size, 1), "change": change}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work_dirs/int8"), help="where the runs are")
    parser.add_argument("--only", nargs="+", default=NETWORKS, metavar="NAME", help="these networks alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = json.loads(DATA.read_text()) if DATA.exists() else {}
    for name in args.only:
        checkpoint = args.work / name / "epoch_1.pth"
        if not checkpoint.exists():
            one_line.learn_digits(name, args.work, epochs=1, side=SIDE)
        for way in WAYS:
            rows.setdefault(name, {})[way] = row(checkpoint, way)
            print(name, way, rows[name][way], flush=True)
        DATA.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
