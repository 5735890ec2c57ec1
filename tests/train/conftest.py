"""A small image folder and a small run on it, for the tests of the engine."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mmengine import Config
from PIL import Image

from hybridzoo.train import digits
from hybridzoo.train.config import load_config
from hybridzoo.train.names import find_config

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ 3 x 12 and val/ 3 x 5 noisy images of 32 px; the colour tells the class, but for one in five of val."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for channel, name in enumerate(reversed(CLASSES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 160, (32, 32, 3))
                pixels[..., (channel + (index == 4 and split == "val")) % 3] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for generated data where the embedded digits are a few: 60 strokes of each split or so."""
    real, home = digits.load_strokes, tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load_strokes", lambda split: tuple(part[:: len(part) // 60] for part in real(split)))
        digits.digits_root("classification", root=home)
    return home


RunConfig = Callable[..., Config]


@pytest.fixture
def run_config() -> RunConfig:
    """Config of a run of seconds: ``run_config("model.drop_rate=0.1", ...)``."""

    def make(*options: str) -> Config:
        # The base, not the demo: tuning the demo must not move these tests.
        base = find_config("biformer_tiny_digits").parents[1] / "_base_" / "classification_digits.py"
        small = (
            "model.name=test_vit",
            "model.img_size=32",
            "train_cfg.max_epochs=2",
            "train_dataloader.batch_size=8",
            "optim_wrapper.optimizer.lr=1e-3",
            "param_scheduler=[{'type': 'CosineAnnealingLR', 'eta_min_ratio': 0.1, 'end': 6, 'by_epoch': True}]",
        )
        return load_config(base, [*small, *options])

    return make
