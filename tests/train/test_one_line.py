"""The three one-line commands on tiny real photographs, with a network of each family: see benchmarks/one_line.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from hybridzoo.checkpoints import cards
from hybridzoo.train import names

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

FILE = Path(__file__).parents[2] / "benchmarks" / "one_line.py"
spec = importlib.util.spec_from_file_location("one_line", FILE)
one_line = importlib.util.module_from_spec(spec)
spec.loader.exec_module(one_line)
LIGHT = {"finetune": "accuracy/top1", "retinanet": "coco/bbox_mAP_50", "segformer": "mIoU"}  # the smallest heads


@pytest.mark.parametrize(
    ("network", "tasks"),
    [
        pytest.param("efficientvit_msra_m0", LIGHT, id="light"),
        *(pytest.param(name, one_line.TASKS, marks=pytest.mark.exhaustive, id=name) for name in one_line.networks()),
    ],
)
def test_three_commands_train_and_predict(network, tasks, tmp_path):
    row, sheet = one_line.try_photographs(network, tmp_path, side=64, count=4, tasks=tasks)
    assert set(row) == {"network", *tasks}
    for recipe in tasks:
        assert (tmp_path / network / recipe / "final.pth").is_file()
    assert sheet.width > 3 * sheet.height / 2


def test_the_tables_agree_with_the_measurements():
    """Each is made of the numbers beside it; the README shows one and links to the other."""
    docs = FILE.parents[1] / "docs"
    readme = (docs.parent / "README.md").read_text()
    for name in ("one_line", "digits"):
        rows = json.loads((docs / f"{name}.json").read_text())
        assert (docs / f"{name}.md").read_text() == one_line.table(rows)
        assert set(rows) <= {*names.our_models(), *names.timm_models()}
    assert "(docs/digits.md" in readme
    for network, row in rows.items():
        assert float(row["CPU minutes"]) <= 10
        assert float(row["top-1"]) > (60 if network == "maxvit_tiny" else 70)  # a tenth by chance
        assert 1000 < int(row["images"].replace(",", "")) <= 8490
    families = {card.model: card.family for card in cards()}
    assert {families[name] for name in rows if name in families} == set(families.values())
    for network, reached in one_line.LEARNED:
        assert float(rows[network]["top-1"]) >= reached


@pytest.mark.exhaustive
@pytest.mark.parametrize(("network", "reached"), one_line.LEARNED)
def test_the_recipe_learns_the_digits(network, reached, tmp_path):
    row = one_line.learn_digits(network, tmp_path, epochs=2, side=32)
    assert float(row["top-1"]) >= reached
