"""The Python examples of `docs/with_other_libraries.md` run, and unsupported arguments raise a clear error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from photographs import image_folder

import hybridzoo  # noqa: F401  registers the models
from hybridzoo.checkpoints import cards

PAGE = (Path(__file__).parents[1] / "docs" / "with_other_libraries.md").read_text()
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.S) for section in PAGE.split("\n## ")
}
NEEDS = {
    "segmentation_models_pytorch": ["segmentation_models_pytorch"],
    "transformers": ["transformers"],
    "peft: LoRA": ["peft"],
    "lightning": ["lightning"],
    "accelerate": ["accelerate"],
    "Grad-CAM and captum": ["captum", "pytorch_grad_cam"],
}


@pytest.mark.parametrize(
    ("title", "block"),
    [
        pytest.param(title, block, id=f"{title} {i}")
        for title, blocks in SECTIONS.items()
        for i, block in enumerate(blocks)
    ],
)
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_the_pages_examples_run(title: str, block: str) -> None:
    for library in NEEDS.get(title, ()):
        pytest.importorskip(library)
    exec(compile(block, "with_other_libraries.md", "exec"), {"__name__": "example"})


def test_timms_loader_reads_a_folder_for_a_network(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(SECTIONS["timm: its own transforms and loader"][0], "with_other_libraries.md", "exec"), names)
    folder = image_folder(tmp_path, side=64, count=2)
    images, labels = next(iter(names["loader"](folder, batch_size=4)))
    assert (images.shape, labels.shape) == ((4, 3, 224, 224), (4,))


def test_networks_do_not_support_an_output_stride() -> None:
    timm.create_model("efficientvit_msra_m0", output_stride=32)
    with pytest.raises(ValueError, match=r"output_stride=16: biformer_tiny has no form with fewer strides"):
        timm.create_model("biformer_tiny", output_stride=16, features_only=True)


@pytest.mark.parametrize("name", sorted({card.family: card.model for card in reversed(cards())}.values()))
def test_networks_accept_the_arguments_of_timms_training_script(name: str) -> None:
    given = dict(in_chans=3, num_classes=4, drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=None, global_pool=None)
    given |= dict(bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path="", pretrained=False)
    with torch.device("meta"):
        assert timm.create_model(name, **given).num_classes == 4
