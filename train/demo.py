"""The demo: trains one backbone for three tasks on the embedded handwritten digits, and draws predictions.

    python -m hybridzoo.train.demo [--out demo] [--data data]

Classification from scratch, then detection with masks and segmentation, both fine-tuned from the classifier. It takes
about a quarter of an hour on two CPU cores. Prints a table, and exits with code 1 if a score misses its target.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from mmengine import Config
from PIL import Image
from rich.console import Console

from hybridzoo.train import draw, report
from hybridzoo.train.config import load_config
from hybridzoo.train.digits import digits_root
from hybridzoo.train.engine import latest_checkpoint, train
from hybridzoo.train.errors import UserError
from hybridzoo.train.layouts import check_detection, check_segmentation
from hybridzoo.train.predict import Prediction, predict

TARGETS = {
    "top-1": 97.0,
    "box AP50": 60.0,
    "mIoU": 75.0,
}  # percent, on strokes of writers that are not in the training set


@dataclass(frozen=True)
class Step:
    """One training: name of the config, name of the work folder, and the step whose weights it starts from."""

    task: str
    config: str
    starts_from: str | None = None


STEPS = (
    Step("classification", "biformer_tiny_digits"),
    Step("detection", "mask-rcnn_biformer_tiny_digits", starts_from="classification"),
    Step("segmentation", "segformer_biformer_tiny_digits", starts_from="classification"),
)


def run(out: Path, options: list[str] | None = None) -> list[report.Result]:
    """Train the three tasks, draw their curves and predictions into `out`, and return the table's lines.

    Args:
        out: folder for checkpoints (`<task>/`), pictures (`*.png`) and scores (`results.json`).
        options: config options `key=value` for all three, as `--cfg-options` takes them.
    """
    console = Console()
    lines: list[report.Result] = []
    for number, step in enumerate(STEPS, 1):
        config = load_config(step.config, options or [])
        work_dir = out / step.task
        weights = out / step.starts_from / "final.pth" if step.starts_from else None
        start = f" --weights {weights}" if weights else ""
        console.rule(f"{number}/{len(STEPS)} {step.task}")
        console.print(f"$ hybridzoo train {step.config} --work-dir {work_dir}{start}", style="bold", soft_wrap=True)
        began = time.perf_counter()
        resume = latest_checkpoint(work_dir) is not None  # from a demo that was interrupted or run before
        scores = train(config, work_dir=work_dir, weights=weights, wandb=False, resume=resume)
        lines += report.results(step.task, scores, (time.perf_counter() - began) / 60, TARGETS)
        draw_predictions(step.task, config, work_dir / "final.pth", out)
    report.draw_curves({step.task: out / step.task for step in STEPS}, out / "curves.png", TARGETS)
    (out / "results.json").write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")
    return lines


def draw_predictions(task: str, config: Config, checkpoint: Path, out: Path) -> Path:
    """Draw a few held-out images with predictions next to the truth: `out/<task>.png`."""
    root = digits_root(**config.digits)
    source = root / "val" if task == "classification" else root / "images" / "val"
    images = sorted(source.rglob("*.png"))
    wanted = 12 if task == "classification" else 4
    chosen = [images[i * len(images) // wanted] for i in range(wanted)]
    drawn = out / task / "predictions"
    seen = [found for image in chosen for found in predict(config, checkpoint, image, drawn / image.parent.name)]
    if task == "classification":
        pictures = [
            draw.draw_classification(
                Image.open(found.image),
                list(zip(found.labels, found.scores, strict=True))[:3],
                truth=found.image.parent.name,
            )
            for found in seen
        ]
        sheet = draw.grid([pictures[i : i + 6] for i in range(0, wanted, 6)])
    else:
        truths = _detection_truth(root, seen) if task == "detection" else _segmentation_truth(root, seen)
        pairs = [[Image.open(found.drawn or found.image), truth] for found, truth in zip(seen, truths, strict=True)]
        rows = [pairs[i] + pairs[i + 1] for i in range(0, wanted, 2)]
        sheet = draw.grid(rows, ("prediction", "ground truth") * 2)
    path = out / f"{task}.png"
    sheet.save(path)
    return path


def _detection_truth(root: Path, seen: list[Prediction]) -> Iterator[Image.Image]:
    from pycocotools.coco import COCO

    from hybridzoo.train.scenes import quietly

    names = check_detection(root)
    with quietly():
        coco = COCO(root / "annotations" / "val.json")
    index = {category: i for i, category in enumerate(sorted(coco.cats))}
    by_file = {image["file_name"]: image["id"] for image in coco.imgs.values()}
    for found in seen:
        objects = coco.imgToAnns[by_file[found.image.name]]
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (o["bbox"] for o in objects)]
        labels = [index[o["category_id"]] for o in objects]
        masks = np.stack([coco.annToMask(o) for o in objects])
        yield draw.draw_boxes(Image.open(found.image), boxes, labels, masks=masks, class_names=names)


def _segmentation_truth(root: Path, seen: list[Prediction]) -> Iterator[Image.Image]:
    names = check_segmentation(root)
    for found in seen:
        classes = np.asarray(Image.open(root / "masks" / "val" / found.image.name))
        yield draw.draw_segmentation(Image.open(found.image), classes, names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="checkpoints, pictures and scores (demo/)")
    parser.add_argument("--data", type=Path, help="where the digits are made ($HYBRIDZOO_DATA or data/)")
    parser.add_argument("--cfg-options", nargs="*", metavar="K=V", help="change the three configs")
    args = parser.parse_args()
    if args.data is not None:
        os.environ["HYBRIDZOO_DATA"] = str(args.data)
    try:
        lines = run(args.out, args.cfg_options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(report.table(lines))
    print(f"pictures: {', '.join(str(args.out / f'{step.task}.png') for step in STEPS)}, {args.out / 'curves.png'}")
    return 0 if all(line.target is None or line.score >= line.target for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
