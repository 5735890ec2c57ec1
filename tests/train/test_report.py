"""The curves and the table, from logs that mmengine wrote."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.visualization import LocalVisBackend
from PIL import Image
from rich.console import Console

from hybridzoo.train.errors import UserError
from hybridzoo.train.report import METRICS, Result, draw_curves, read_curves, results, table

TARGETS = {"top-1": 97.0, "box AP50": 60.0, "mIoU": 75.0}


def log(work_dir: Path, stamp: str, epochs, scores=None, per_epoch=2, loss=None):
    """What mmengine's LoggerHook writes in a run of these epochs: a line each 10 iterations, then the validation."""
    backend = LocalVisBackend(str(work_dir / stamp / "vis_data"))
    for epoch in epochs:
        for step in range(per_epoch):
            at = 10 * (epoch * per_epoch + step + 1)
            value = loss if loss is not None else 3 / (at + 1)
            backend.add_scalars({"lr": 0.1, "loss": value, "epoch": epoch + 1, "iter": at}, step=at, file_path="a.json")
        named = scores(epoch) if scores else {"accuracy/top1": 50.0 + epoch}
        backend.add_scalars({**named, "time": 0.1}, step=epoch + 1, file_path="a.json")


def test_losses_and_scores_have_their_iteration(tmp_path):
    log(tmp_path, "20260101_000000", range(3))
    curves = read_curves(tmp_path)
    assert [at for at, _ in curves.loss] == [10, 20, 30, 40, 50, 60]
    assert curves.loss[0][1] == pytest.approx(3 / 11)
    assert curves.scores["accuracy/top1"] == [(20, 50.0), (40, 51.0), (60, 52.0)]


def test_a_resumed_run_replaces_repeated_iterations(tmp_path):
    log(tmp_path, "20260101_000000", range(3), loss=9.0)  # killed in its third epoch, whose checkpoint is missing
    log(tmp_path, "20260101_010000", range(2, 4), scores=lambda epoch: {"accuracy/top1": 90.0 + epoch})
    curves = read_curves(tmp_path)
    assert [at for at, _ in curves.loss] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert [value == 9.0 for _, value in curves.loss] == [True] * 4 + [False] * 4
    assert curves.scores["accuracy/top1"] == [(20, 50.0), (40, 51.0), (60, 92.0), (80, 93.0)]


def test_a_new_run_in_the_same_folder_starts_a_new_curve(tmp_path):
    log(tmp_path, "20260101_000000", range(3))
    log(tmp_path, "20260101_010000", range(1))
    assert [at for at, _ in read_curves(tmp_path).loss] == [10, 20]


def test_test_runs_and_cut_lines_are_left_out(tmp_path):
    log(tmp_path, "20260101_000000", range(2))
    LocalVisBackend(str(tmp_path / "20260101_010000" / "vis_data")).add_scalars({"accuracy/top1": 1.0}, step=0)
    file = tmp_path / "20260101_000000/vis_data/scalars.json"
    file.write_text(file.read_text() + '{"lr": 0.1, "lo')
    curves = read_curves(tmp_path)
    assert len(curves.loss) == 4
    assert curves.scores["accuracy/top1"] == [(20, 50.0), (40, 51.0)]


def test_folder_without_log(tmp_path):
    with pytest.raises(UserError, match="no training log in"):
        read_curves(tmp_path)


def test_curves_picture(tmp_path):
    made = {
        "classification": lambda epoch: {"accuracy/top1": 90.0 + epoch, "accuracy/top5": 99.0},
        "detection": lambda epoch: {"coco/bbox_mAP_50": 0.1 * epoch, "coco/segm_mAP_50": 0.08 * epoch},
        "segmentation": lambda epoch: {"mIoU": 10.0 * epoch, "aAcc": 50.0},
    }
    for task, scores in made.items():
        log(tmp_path / task, "20260101_000000", range(6), scores)
    runs = {task: tmp_path / task for task in made}
    out = draw_curves(runs, tmp_path / "deep/curves.png", TARGETS)
    assert out == tmp_path / "deep/curves.png"
    three = Image.open(out)
    assert three.width > three.height > 600
    one = Image.open(draw_curves({"detection": runs["detection"]}, tmp_path / "one.png"))
    assert one.height == three.height
    assert one.width == pytest.approx(three.width / 3, abs=2)
    # box and mask score have a colour each, also for eyes that see no red or green: blue against orange
    colours = {tuple(colour) for colour in np.asarray(one.convert("RGB")).reshape(-1, 3)}
    assert {(59, 111, 182), (209, 113, 28)} <= colours
    with_target = draw_curves({"detection": runs["detection"]}, tmp_path / "target.png", TARGETS)
    assert (np.asarray(Image.open(with_target)) != np.asarray(one)).any()


def test_run_without_validation_still_shows_its_loss(tmp_path):
    backend = LocalVisBackend(str(tmp_path / "20260101_000000" / "vis_data"))
    backend.add_scalars({"loss": 1.0, "iter": 10}, step=10)
    assert draw_curves({"segmentation": tmp_path}, tmp_path / "c.png", TARGETS).exists()


def test_results_are_in_percent_and_skip_missing_values():
    found = results("detection", {"coco/bbox_mAP_50": 0.71, "coco/bbox_mAP": 0.5}, 4.0, TARGETS)
    assert found == [Result("detection", "box AP50", 71.0, 60.0, 4.0)]
    assert results("classification", {"accuracy/top1": 98.25}, 3.0, TARGETS)[0].score == 98.25


def test_the_table_shows_the_scores():
    scores = {"accuracy/top1": 98.25, "coco/bbox_mAP_50": 0.512, "coco/segm_mAP_50": 0.4, "mIoU": 75.0}
    lines = [line for task in METRICS for line in results(task, scores, 4.25, TARGETS)]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(lines))
    rows = [line.split() for line in console.export_text().splitlines() if "%" in line]
    assert rows == [
        ["classification", "top-1", "98.2", "%", "≥", "97.0", "%", "yes", "4.2"],
        ["detection", "box", "AP50", "51.2", "%", "≥", "60.0", "%", "no", "4.2"],
        ["mask", "AP50", "40.0", "%"],
        ["segmentation", "mIoU", "75.0", "%", "≥", "75.0", "%", "yes", "4.2"],
    ]


def test_metric_names_are_those_that_the_tasks_report():
    from hybridzoo.train.classification import TopK

    measured = TopK().compute_metrics([0, 1])
    assert {f"{TopK.default_prefix}/{name}" for name in measured} >= {METRICS["classification"][0].key}
    coco = pytest.importorskip("mmdet.evaluation").CocoMetric
    assert all(metric.key.startswith(f"{coco.default_prefix}/") for metric in METRICS["detection"])
