"""One line for each network and task, as a person types it: what came of it, as a table and as pictures.

    python benchmarks/one_line.py photographs --out docs/one_line.md     a few steps on tiny real photographs
    python benchmarks/one_line.py digits --out docs/digits.md            fine-tuning from scratch until it has learned

Photographs: the pictures inside scikit-image's wheel, cut into tiles (tests/photographs.py); three commands a network.
Digits: the handwritten digits inside scikit-learn's; classification alone, ten CPU minutes a network at most.
`--only NAME ...` runs some networks; rows that stand in the table already are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import photographs

from hybridzoo.__main__ import main as hybridzoo
from hybridzoo.checkpoints import cards
from hybridzoo.train.digits import digits_root

TASKS = {"finetune": "accuracy/top1", "mask-rcnn": "coco/bbox_mAP_50", "upernet": "mIoU"}
QUICK = ("--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--no-wandb", "--weights", "none")
# Digits are not flipped and hardly cropped: a mirrored 2 is no 2, nor is half an 8. The rest is the recipe's, but for a
# size and a length that fit minutes.
DIGITS = ("--batch-size", "32", "--workers", "0", "--device", "cpu", "--no-wandb", "--weights", "none", "--seed", "0")
# Network, and the top-1 that two epochs of digits reach: less than was measured, for other machines' sake.
LEARNED = (("efficientvit_msra_m0", 72.0), ("shvit_s1", 78.0))
WHOLE = (
    *("--cfg-options", "train_dataloader.dataset.transform.hflip=0.0"),
    *("train_dataloader.dataset.transform.scale=(0.8,1.0)", "val_dataloader.dataset.transform.crop_pct=1.0"),
)


def networks() -> list[str]:
    """The smallest network of each family of ours, and two of timm's."""
    smallest = {card.family: card.model for card in sorted(cards(), key=lambda card: -card.params)}
    return [*smallest.values(), "davit_tiny", "shvit_s1"]


def call(*words: object) -> str:
    """What one command line prints; it has to succeed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = hybridzoo([str(word) for word in words])
    if code:
        raise SystemExit(f"hybridzoo {' '.join(map(str, words))}: {err.getvalue()}")
    return out.getvalue()


def score(printed: str, metric: str) -> float:
    """The last value of a metric in what `train` printed."""
    return float([line.split()[1] for line in printed.splitlines() if line.split()[:1] == [metric]][-1])


def try_photographs(
    network: str, folder: Path, side: int = 96, count: int = 8, tasks: Mapping[str, str] = TASKS
) -> tuple[dict[str, str], Image.Image]:
    """Train, and predict with, one network on the three tasks.

    Args:
        network: its name.
        folder: for pictures and runs.
        side: of the pictures, in pixels.
        count: training pictures of each class, and scenes; half as many for validation.
        tasks: recipe -> the metric to report.

    Returns:
        A table's row, and a picture per task of what it predicts, side by side.
    """
    pictures = photographs.image_folder(folder / "photographs", side=side, count=count)
    scenes = photographs.scenes(folder / "scenes", side=side, count=count)
    row, drawn = {"network": network}, []
    for recipe, metric in tasks.items():
        data = pictures if recipe == "finetune" else scenes
        run = folder / network / recipe
        began = time.process_time()
        command = ("train", recipe, "--model", network, "--data", data, "--img-size", side)
        printed = call(*command, *QUICK, "--work-dir", run)
        row[recipe] = f"{score(printed, metric):.3g} ({time.process_time() - began:.0f} s)"
        source = sorted((pictures / "val" / "cat" if recipe == "finetune" else scenes / "images/val").iterdir())[0]
        (config,) = run.glob("*.py")
        call("predict", config, run / "final.pth", source, "--out", run / "drawn", "--score", 0.5)
        (picture,) = [file for file in (run / "drawn").rglob("*") if file.suffix in (".png", ".jpg")]
        drawn.append(Image.open(picture).convert("RGB"))
    sheet = Image.new("RGB", (sum(p.width for p in drawn), max(p.height for p in drawn)), "white")
    left = 0
    for picture in drawn:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return row, sheet


def first_images(data: Path, count: int, folder: Path) -> Path:
    """An image folder with `count` training images of `data`, as many of each class as of any other; all of `val`."""
    if folder.exists():
        shutil.rmtree(folder)
    classes = sorted((data / "train").iterdir())
    for label in classes:
        (folder / "train" / label.name).mkdir(parents=True)
        for image in sorted(label.iterdir())[: count // len(classes)]:
            (folder / "train" / label.name / image.name).symlink_to(image)
    (folder / "val").symlink_to(data / "val")
    return folder


def learn_digits(network: str, folder: Path, *, epochs: int, side: int, images: int | None = None) -> dict[str, str]:
    """Fine-tune one network on the digits from scratch, on so many training images or all; a table's row."""
    began = time.process_time()
    data = digits_root("classification").resolve()
    if images is not None:
        data = first_images(data, images, folder / f"{images}_images")
    count = sum(1 for _ in (data / "train").glob("*/*"))
    words = ("--data", data, "--img-size", side, "--epochs", epochs, *DIGITS, *WHOLE)
    printed = call("train", network, *words, "--work-dir", folder / network)
    minutes = (time.process_time() - began) / 60
    return {
        "network": network,
        "top-1": f"{score(printed, 'accuracy/top1'):.1f}",
        "images": f"{count:,}",
        "epochs": str(epochs),
        "pixels": str(side),
        "CPU minutes": f"{minutes:.1f}",
    }


def write(rows: dict[str, dict[str, str]], out: Path) -> None:
    """The rows as a Markdown table, and as JSON beside it for the next run to add to."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    out.write_text(table(rows))


def table(rows: dict[str, dict[str, str]]) -> str:
    """Rows as a Markdown table."""
    names = list(next(iter(rows.values())))
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(row[name] for name in names)} |" for row in rows.values()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("photographs", "digits"))
    parser.add_argument("--out", type=Path, required=True, help="Markdown file; JSON and pictures go beside it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks alone")
    parser.add_argument("--work", type=Path, default=Path("work_dirs/one_line"), help="where the runs go")
    parser.add_argument("--epochs", type=int, default=2, help="of digits")
    parser.add_argument("--images", type=int, help="of digits to train on; default all")
    parser.add_argument("--side", type=int, default=32, help="of digits, in pixels")
    args = parser.parse_args()
    known = args.out.with_suffix(".json")
    rows = json.loads(known.read_text()) if known.is_file() else {}
    for network in args.only or networks():
        if args.what == "photographs":
            rows[network], sheet = try_photographs(network, args.work)
            sheet.save(args.work / f"{network}.png")
        else:
            how = dict(epochs=args.epochs, side=args.side, images=args.images)
            rows[network] = learn_digits(network, args.work / "digits", **how)
        print(*rows[network].values(), sep="  ", flush=True)
        write(rows, args.out)


if __name__ == "__main__":
    main()
