"""How long images take to be read and augmented, beside how long a network trains on them: CPU seconds an image.

    python -m benchmarks.input_pipeline

CPU time is counted rather than time, so that other work on the machine matters little. The images are photographs that
come with scikit-image, as JPEG with a shorter side of 375 pixels, which is about ImageNet's size.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import skimage
import torch
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from hybridzoo.train import engine
from hybridzoo.train.bench import rows
from hybridzoo.train.config import load_config
from hybridzoo.train.networks import create

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg")
NETWORKS = ("efficientvit_msra_m0", "efficientvit_mit_b0", "dinat_mini", "maxvit_tiny")
OUT = Path(__file__).parent / "results" / "input_pipeline_cpu.json"


def photographs(root: Path) -> None:
    for split in ("train", "val"):
        for name in PHOTOGRAPHS:
            image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
            scale = 375 / min(image.size)
            folder = root / split / name.partition(".")[0]
            folder.mkdir(parents=True)
            image.resize([round(scale * side) for side in image.size]).save(folder / "0.jpg", quality=90)


def cpu_seconds(work: Callable[[], object], least: float = 2.0) -> float:
    """Mean CPU seconds of a call, over calls of at least `least` seconds in all, after one that is not counted."""
    work()
    began, calls = time.process_time(), 0
    while (spent := time.process_time() - began) < least:
        work()
        calls += 1
    return spent / calls


def reading(root: Path) -> float:
    """CPU seconds an image by the everyday recipe's reader and augmentation."""
    config = load_config("finetune", model="dinat_mini")
    engine.prepare(config).configure(config, root)
    with DefaultScope.overwrite_default_scope("mmengine"):
        dataset = DATASETS.build(config.train_dataloader.dataset)
    return cpu_seconds(lambda: [dataset[i] for i in range(len(dataset))]) / len(dataset)


def training(name: str, batch: int = 4) -> float:
    """CPU seconds an image of 224 x 224, forward and backward."""
    torch.manual_seed(0)
    model = create("model", name, {}, num_classes=10).train()
    images = torch.randn(batch, 3, 224, 224)
    return cpu_seconds(lambda: model(images).sum().backward()) / batch


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder))
        found = [("reading and augmenting (finetune)", reading(Path(folder)))]
    found += [(f"training {name}", training(name)) for name in NETWORKS]
    common: rows.Row = dict(part="input pipeline", shape=dict(height=224, width=224), dtype="float32")
    common |= rows.machine("cpu", 1)
    rows.write(OUT, [common | dict(op=what, cpu_us=round(seconds * 1e6, 1)) for what, seconds in found])
    for what, seconds in found:
        print(f"{what}: {1000 * seconds:.1f} CPU ms an image")


if __name__ == "__main__":
    main()
