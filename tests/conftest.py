"""For every test: one thread a process, since the suite runs one process a core; who shares a process; chance."""

import atexit
import gc
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the tests' subprocesses
os.environ.setdefault("WANDB_MODE", "offline")

# What collecting imports and makes stays: looking for garbage in it takes a fifth of the time, and more in every test.
gc.disable()
if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)  # it has reported by now, and freeing all that it holds takes ten seconds
else:
    atexit.register(gc.unfreeze)  # some libraries complain of what is left; after pytest has looked for garbage again

# mmengine looks into transformers, which peft brings, for one optimizer: 2.6 CPU seconds. It is hidden while tests are
# collected, which imports all else.
HIDDEN = "transformers"
if HIDDEN not in sys.modules:
    sys.modules[HIDDEN] = None  # type: ignore[assignment]

pytest_plugins = ["cpu_seconds"]

# In the order of their longest files.
FOLDERS = {n: i for i, n in enumerate(("train", "tests", "backbones", "layers", "kernels", "checkpoints"))}

# Sweeps draw new examples in every run but CI's, which judges a change and must not fail by the day's luck. No example
# fails for taking long: a loaded machine is no defect.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """A file's tests share a process and its fixtures; what is the same for all models goes model by model instead.

    Marked `alone`: a test that takes as long as a file. These come first, and the folders of long files before those of
    short ones, so that none is left for the end, when other workers have nothing to do. Tests marked `forks` run before
    all others: some tests make PyTorch start threads for gradients, and after that a fork of the process cannot train.
    """
    forks, alone, contract, others = [], [], [], []
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if item.get_closest_marker("forks"):
            forks.append(item)
            group = "forks"
        elif item.get_closest_marker("alone"):
            alone.append(item)
            group = item.nodeid
        elif item.path.name in ("test_contract.py", "test_tools.py") and name is not None:
            contract.append((name, item))
            group = f"contract of {name}"
        else:
            others.append(item)
            group = str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    contract.sort(key=lambda pair: pair[0])
    others.sort(key=lambda item: FOLDERS.get(item.path.parent.name, len(FOLDERS)))
    items[:] = [*forks, *alone, *(item for _, item in contract), *others]


def pytest_collection_finish():
    if sys.modules.get(HIDDEN, pytest) is None:
        del sys.modules[HIDDEN]
    # mmengine collects garbage after reading annotations: a fifth of a second where so much is imported.
    if datasets := sys.modules.get("mmengine.dataset.base_dataset"):
        datasets.gc = SimpleNamespace(collect=lambda: 0)
    gc.freeze()
    gc.enable()
