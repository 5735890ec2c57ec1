"""Tables of block sizes: what comes before what, what is a table, and that plans follow what is tried."""

import json
from dataclasses import replace

import pytest
import torch

from hybridzoo.kernels import tuning
from hybridzoo.kernels.neighborhood import triton_configs as na2d_configs
from hybridzoo.kernels.routed import triton_configs as routed_configs
from hybridzoo.kernels.tuning import Config, Key

TABLE = {("forward", 32, 2): Config(64, 64, 4, 2, 255)}
DEFAULT, TUNED, TRIED = TABLE["forward", 32, 2], Config(64, 32, 4, 3), Config(32, 32, 2, 1)
KEY = Key("routed", "forward", 32, 2, "49 regions of 64, top 1")
GPU = torch.device("cuda", 0)


def row(key, config):
    return dict(key._asdict(), config=[config.queries, config.keys, config.warps, config.stages, config.registers])


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU by name only, and a folder for its table."""
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    tuning.forget()
    yield tmp_path / "nvidia-h100-80gb-hbm3.json"
    tuning.forget()


def test_defaults_are_used_without_a_tuned_table(gpu):
    assert tuning.pick(TABLE, KEY, GPU) == tuning.pick(TABLE, KEY) == DEFAULT
    assert tuning.pick(TABLE, KEY._replace(block_d=16), GPU) == DEFAULT  # head_dim 16 takes the row of 32


@pytest.mark.parametrize("shape", [KEY.shape, ""], ids=["this shape", "all shapes"])
def test_the_table_of_the_gpu_overrides_the_defaults(gpu, shape):
    gpu.write_text(json.dumps({"rows": [row(KEY._replace(shape=shape), TUNED)]}))
    assert tuning.pick(TABLE, KEY, GPU) == TUNED
    assert tuning.pick(TABLE, KEY, torch.device("cpu")) == DEFAULT
    assert tuning.pick(TABLE, KEY._replace(shape="other"), GPU) == (DEFAULT if shape else TUNED)


def test_the_users_table_overrides_all_others(gpu, monkeypatch, tmp_path):
    gpu.write_text(json.dumps({"rows": [row(KEY, DEFAULT)]}))
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"rows": [row(KEY, TUNED)]}))
    monkeypatch.setenv(tuning.VARIABLE, str(mine))
    assert tuning.pick(TABLE, KEY, GPU) == TUNED


@pytest.mark.parametrize("text", [None, "", "{}", '{"rows": [{}]}', '{"rows": [1]}'])
def test_a_file_that_is_not_a_table_is_named(gpu, monkeypatch, tmp_path, text):
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv(tuning.VARIABLE, str(file))
    with pytest.raises(ValueError, match=r"bad\.json is not a table of tuned kernels"):
        tuning.pick(TABLE, KEY, GPU)


def test_plans_use_the_configuration_that_is_tried():
    @tuning.plan
    def blocks(height):
        return tuning.pick(TABLE, KEY)

    with tuning.asked() as found:
        assert blocks(7) is blocks(7) is DEFAULT
    assert found == {KEY: DEFAULT}
    with tuning.trying({KEY: TRIED}):
        assert blocks(7) == TRIED
    assert blocks(7) == DEFAULT


@pytest.mark.parametrize("blocks", [True, False])
def test_candidates_are_new_and_within_limits(blocks):
    found = tuning.candidates(DEFAULT, blocks)
    assert len(found) == len(set(found)) > 4
    assert DEFAULT not in found
    assert Config(64, 64, 4, 2) in found  # the compiler left to itself
    assert all(16 <= size <= 128 for c in found for size in (c.queries, c.keys))
    assert blocks or {(c.queries, c.keys) for c in found} == {(64, 64)}


def test_shipped_tables_are_readable():
    for file in tuning.FOLDER.glob("*.json"):
        assert tuning.read_table(file)


# ------------------------------------------------------------------------------------------------- tables as shipped

CONFIGS = {"na2d": na2d_configs, "routed": routed_configs}
SHIPPED = sorted(tuning.FOLDER.glob("*.json"))


def accepted(key, config):
    """Whether a kernel of today takes it: another kernel, or block, is left over from an earlier one."""
    configs = CONFIGS[key.operator]
    if key.kernel not in configs.KINDS:
        return False
    if key.kernel in getattr(configs, "WHOLE", ()):  # its blocks follow from the shape
        if not key.shape:
            return False
        default = replace(config, warps=0)  # so that the very block is among those tried
    else:
        default = configs.TABLE.get(key[1:4]) or configs.TABLE[key.kernel, 32, key.itemsize]
    return config == default or config in configs.candidates(key, default)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_rows_of_shipped_tables_fit_the_kernels(file):
    """Where this fails, the rows it names are stale: tune again (`python -m benchmarks.gpu`), or delete them."""
    table = tuning.read_table(file)
    assert table
    assert file.name == tuning.table_name(json.loads(file.read_text())["device"])
    assert [key for key, config in table.items() if not accepted(key, config)] == []


def test_outdated_rows_are_harmless(monkeypatch, tmp_path):
    """One for a kernel that is no more, and one whose block holds no tile of its map."""
    axis = na2d_configs.Axis.of(56, 7, 1)
    where = "forward_whole", axis, axis, 32, 2, torch.device("cpu")
    default = na2d_configs.whole(*where)
    key = na2d_configs._key(*where[:5])
    file = tmp_path / "old.json"
    file.write_text(json.dumps({"rows": [row(key, Config(16, 16, 1, 1)), row(key._replace(kernel="gone"), TUNED)]}))
    monkeypatch.setenv(tuning.VARIABLE, str(file))
    tuning.forget()
    assert na2d_configs.whole(*where) == default
    monkeypatch.undo()
    tuning.forget()
