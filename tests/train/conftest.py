"""A small image folder and a small run on it, for the tests of the engine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.utils.data
from hub_server import TOKEN, Hub
from mmengine import Config
from PIL import Image
from yapf.yapflib import yapf_api

from hybridzoo.train import digits
from hybridzoo.train.config import load_config
from hybridzoo.train.names import find_config

CLASSES = ("blue", "green", "red")


FORMAT_CODE = yapf_api.FormatCode


@pytest.fixture(scope="session", autouse=True)
def _unformatted() -> Iterator[None]:
    """mmengine formats a run's config for every checkpoint, up to a CPU second each; it means the same without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yapf_api, "FormatCode", lambda text, **options: (text, True))
        yield


@pytest.fixture(scope="session", autouse=True)
def _impatient() -> Iterator[None]:
    """PyTorch waits up to five seconds for readers that an exception left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
        yield


@pytest.fixture
def formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs are formatted, as users get them."""
    monkeypatch.setattr(yapf_api, "FormatCode", FORMAT_CODE)


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the hub's other way for large files
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub().running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        template = "{endpoint}/{repo_id}/resolve/{revision}/{filename}".replace("{endpoint}", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)  # for timm: they are
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)  # read once in a process
        yield running
