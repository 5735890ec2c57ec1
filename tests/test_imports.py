"""What importing does, in processes that have imported PyTorch, torchvision and perhaps timm, and nothing else.

They are forks of one process of this file, since these three take seconds to import.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# What `import hybridzoo` does and takes after timm, said by three forks. Then runs a program for every line that it
# reads, in a fork that finds timm imported, and answers with its exit code.
FORKS = """
import json, os, sys, time, warnings
start = time.perf_counter()
import torch, torchvision
torch_seconds = time.perf_counter() - start

def timed():
    a = time.perf_counter(); import timm; b = time.perf_counter()
    modules, timms = set(sys.modules), {n: timm.models.model_entrypoint(n) for n in timm.list_models()}
    warnings.simplefilter("error")
    c = time.perf_counter(); import hybridzoo; d = time.perf_counter()
    return dict(
        ratio=1 + (d - c) / (torch_seconds + b - a),
        added=sorted(set(sys.modules) - modules),
        changed=[n for n, f in timms.items() if timm.models.model_entrypoint(n) is not f],
        ours=len(timm.list_models()) - len(timms),
    )

for _ in range(3):
    child = os.fork()
    if not child:
        print(json.dumps(timed()), flush=True)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0

import timm
for line in sys.stdin:
    program, words, folder, *files = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.argv, sys.orig_argv = words, [sys.executable, *words]
        exec(compile(program, words[0], "exec"), dict(__name__="__main__"))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    """The process, and what its first three forks said."""
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, [json.loads(process.stdout.readline()) for _ in range(3)]
        process.stdin.close()


@pytest.fixture(scope="module")
def printed_by(forks, tmp_path_factory):
    """What a program prints that ends well: `printed_by(program, folder, *words)`, as `python -c` runs it."""
    process, folder, numbers = forks[0], tmp_path_factory.mktemp("printed"), itertools.count()

    def run(program: str, where: Path = Path("/"), words: tuple[str, ...] = ("-c",)) -> str:
        number = next(numbers)
        out, err = (folder / f"{number}.{name}" for name in ("out", "err"))
        print(json.dumps([program, words, *map(str, (where, out, err))]), file=process.stdin, flush=True)
        assert int(process.stdout.readline()) == 0, out.read_text() + err.read_text()
        return out.read_text()

    return run


@pytest.fixture
def imports(forks) -> list[dict]:
    """What importing hybridzoo after timm does and takes, three times."""
    return forks[1]


def test_import_adds_nothing_heavy(imports):
    added = imports[0]["added"]
    assert "hybridzoo.backbones.biformer" in added
    heavy = {"triton", "mmengine", "mmcv", "mmdet", "mmseg", "wandb", "matplotlib", "rich", "typer", "sklearn"}
    assert not {name.split(".")[0] for name in added} & heavy
    assert not [name for name in added if name.startswith("hybridzoo.train")]


def test_import_costs_little_more_than_timm(imports):
    """At most 1.15 times `import timm`: what comes after timm is timed in the same process, so that noise is shared."""
    ratios = [found["ratio"] for found in imports]
    assert statistics.median(ratios) <= 1.15, ratios


def test_no_name_of_timm_is_overwritten(imports):
    assert imports[0]["changed"] == []
    assert imports[0]["ours"] >= 5


EXTRAS = ("mmengine", "mmcv", "mmdet", "mmseg", "rich", "typer", "wandb", "matplotlib", "sklearn", "scipy")
WITHOUT_EXTRAS = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS}))
import hybridzoo, hybridzoo.layers, hybridzoo.kernels, hybridzoo.checkpoints, timm, torch
print(list(timm.create_model("biformer_tiny", num_classes=2).eval()(torch.zeros(1, 3, 32, 32)).shape))
"""


def test_importing_is_possible_without_the_extras(printed_by):
    """A core installation has no mmengine, rich or typer: the front door and every room but train must not ask."""
    assert printed_by(WITHOUT_EXTRAS) == "[1, 2]\n"


MODULES = """
import gc, importlib, os, pkgutil, sys
import mmengine.hooks, mmengine.runner, mmengine.visualization, timm, typer
import hybridzoo

gc.freeze()

for room in ("kernels", "layers", "checkpoints", "backbones", "train"):
    folder = os.path.dirname(importlib.util.find_spec(f"hybridzoo.{room}").origin)
    for module in pkgutil.walk_packages([folder], f"hybridzoo.{room}."):
        if module.name in sys.modules:  # `import hybridzoo` itself imports it
            continue
        child = os.fork()
        if not child:
            try:
                importlib.import_module(module.name)
            except Exception as problem:
                print(f"{module.name}: {problem}", flush=True)
            os._exit(0)
        os.waitpid(child, 0)
"""


def test_every_module_can_be_imported_first(printed_by):
    """No module needs that another one was imported before it; libraries are loaded once, a fork imports each."""
    assert printed_by(MODULES) == ""


def test_reading_checkpoints_needs_neither_train_nor_mmengine(printed_by, tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pth")
    program = "import sys; from hybridzoo.checkpoints import reading; print(reading.read_checkpoint('a.pth')['weight'])"
    program += "\nassert not any(name.startswith(('mmengine', 'hybridzoo.train')) for name in sys.modules)"
    assert printed_by(program, tmp_path) == "tensor([1., 1.])\n"


def test_our_command_registers_the_models_when_it_needs_them(printed_by):
    """`python -m hybridzoo` knows no model at first; any other process knows them all once hybridzoo is imported."""
    program = "import hybridzoo, timm; print(timm.is_model('biformer_tiny'))"
    said = printed_by(program, words=("train.py", "-m", "hybridzoo"))
    assert said == "True\n", "somebody's own program, whatever its options are called"


def test_the_command_knows_our_models_where_it_composes_a_run(printed_by):
    """Its process registers them late, and a recipe asks for them before any verb has imported the engine."""
    program = "from hybridzoo.train import compose; print(compose.read_network('maxvit_tiny').name)"
    assert printed_by(program, words=("hybridzoo",)) == "maxvit_tiny\n"


def test_the_line_for_timms_scripts_registers_the_networks(printed_by, tmp_path):
    script = tmp_path / "validate.py"
    script.write_text("import sys, timm\nassert timm.is_model('biformer_tiny')\nprint(__name__, sys.argv[1:])\n")
    (line,) = re.findall(r'python -c "(.*?)"', (ROOT / "docs" / "with_other_libraries.md").read_text())
    assert printed_by(line, words=("-c", str(script), "DATA")).strip() == "__main__ ['DATA']"


def test_a_config_of_another_project_needs_one_import(printed_by, tmp_path):
    file = tmp_path / "stranger.py"
    file.write_text(
        'custom_imports = dict(imports=["hybridzoo.train"])\n'
        '_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py"]\n'
        'model = dict(backbone=dict(_delete_=True, type="PyramidBackbone", name="test_convnext"),'
        " neck=dict(in_channels=[24, 32, 48, 64]))\n"
    )
    program = f"""
import json
from mmengine import Config
config = Config.fromfile({str(file)!r})
import torch, warnings
warnings.simplefilter("ignore")
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
register_all_modules()
from mmcv.ops import nms
kept = nms(torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9]]), torch.tensor([0.9, 0.8]), 0.5)[1]
print(json.dumps([type(MODELS.build(config.model).backbone).__name__, kept.tolist()]))
"""
    assert json.loads(printed_by(program, tmp_path).splitlines()[-1]) == ["PyramidBackbone", [0]]
