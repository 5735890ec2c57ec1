"""Scores of each class, the content of `results.json`, its pictures, and the arguments of the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from hybridzoo.train import cli, measures, results, tables
from hybridzoo.train.errors import UserError


def test_scores_are_those_of_scikit_learn():
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # 2 CPU seconds

    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    details = measures.classification(true.tolist(), predicted.tolist(), "abcd")
    assert np.array_equal(details.counts, confusion_matrix(true, predicted))
    expected = precision_recall_fscore_support(true, predicted)
    for i, row in enumerate(details.rows):
        found = [row[name] / 100 for name in ("precision", "recall", "f1")]
        assert found == pytest.approx([expected[k][i] for k in range(3)])
        assert row["images"] == expected[3][i]


def test_a_class_that_never_occurs_has_no_score():
    details = measures.classification([0, 0, 1], [0, 1, 1], "abc")
    assert [np.isnan(details.rows[2][name]) for name in ("precision", "recall", "f1")] == [True] * 3
    assert details.rows[0]["precision"] == 100
    details = measures.segmentation(1, np.array([[3, 1], [0, 0]]), "ab")
    assert details.rows[0]["iou"] == 75
    assert details.rows[1]["iou"] == 0
    assert np.isnan(details.rows[1]["accuracy"])


def test_objects_are_matched_once_by_descending_score():
    true, crowd = np.array([0, 1, 2]), np.array([False, False, True])
    overlaps = np.array(
        [
            [0.6, 0.0, 0.0],  # the surest takes the first object
            [0.9, 0.4, 0.0],  # which is taken; of the second it has too little
            [0.0, 0.7, 0.0],  # a right box with a wrong name
            [0.0, 0.0, 0.8],  # falls on a crowd: counts neither way
        ]
    )
    pairs = measures.matched(true, np.array([0, 0, 2, 2]), overlaps, crowd)
    assert pairs == [(0, 0), (-1, 0), (1, 2)]
    assert measures.matched(true, np.zeros(0, int), np.zeros((0, 3)), crowd) == [(0, -1), (1, -1)]
    assert measures.matched(np.zeros(0, int), np.array([1]), np.zeros((1, 0)), np.zeros(0, bool)) == [(-1, 1)]


@pytest.mark.parametrize("classes", [2, 30, 150])
def test_results_are_plain_json_and_draw(tmp_path, classes, monkeypatch):
    rng = np.random.default_rng(0)
    names = [f"class ${i}$ [x] with a long name" for i in range(classes)]
    counts = np.diag(rng.integers(0, 9, classes + 1))
    recall = np.linspace(1, 0, 101)
    precision = np.full((10, 101, classes, 4, 3), -1.0)
    precision[:, :, 1:] = recall[None, :, None, None, None]
    thresholds = type("Params", (), {"iouThrs": np.linspace(0.5, 0.95, 10)})
    evaluated = {kind: {"precision": precision, "params": thresholds} for kind in ("box", "mask")}
    details = measures.detection(3, counts, names, evaluated)
    assert [details.rows[1][name] for name in ("mask AP", "box AP50")] == pytest.approx([0.5, 0.5])
    file = results.write(tmp_path, "detection", {"coco/bbox_mAP": 0.5}, details, split="val", data="d", checkpoint="c")
    content = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN
    assert content == results.read(tmp_path)
    assert content["per_class"][0]["box AP"] is None
    assert content["confusion_matrix"]["counts"] == counts.tolist()
    assert names[0] not in content["pr_curves"]["box"]
    drawn = results.draw(tmp_path)
    assert [path.name for path in drawn] == ["confusion_matrix.png", "pr_curves.png"]
    for path in drawn:
        picture = np.asarray(Image.open(path).convert("L"))
        assert 400 < min(picture.shape) < max(picture.shape) < 2000
        assert picture.std() > 5
    table = tables.classes(content["per_class"])
    assert len(table.rows) == min(classes, tables.MOST_CLASSES)

    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"results.json: cannot be written \(No space left"):
        results.write(tmp_path, "detection", {}, None)
    assert file.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_no_results_are_one_error(tmp_path):
    for text in (None, "", "[]", '{"format": 2}'):
        if text is not None:
            (tmp_path / results.NAME).write_text(text)
        with pytest.raises(UserError, match=r"results.json: "):
            results.draw(tmp_path)


@pytest.mark.parametrize(
    ("given", "spread"),
    [
        ("predict r p --json --csv", "predict r p --json= --csv="),
        ("predict r --json p --csv x.csv", "predict r --json= p --csv x.csv"),
        ("predict r p --json a.json --csv=b.csv", "predict r p --json a.json --csv=b.csv"),
        ("predict r --csv a.json -- --json", "predict r --csv= a.json -- --json"),
    ],
)
def test_files_of_predictions_need_no_name(given, spread):
    assert cli.spread_options(given.split()) == spread.split()
