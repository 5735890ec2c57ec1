"""Whatever a file is or pretends to be: its tensors come back, or one clear line; nothing in it is ever executed."""

from __future__ import annotations

import argparse
import collections
import gzip
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Fork
from safetensors.torch import save_file

from hybridzoo.checkpoints.reading import (
    CheckpointError,
    UnsafeError,
    read_checkpoint,
    read_state_dict,
    strip_prefixes,
)

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def is_state(found: dict[str, Any]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


# What is in published files beside the weights, made as their training scripts make it ---------------------------


class CfgNode(dict):
    """As yacs has it: a dictionary whose settings are attributes."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.__dict__["__immutable__"] = True


class DictConfig:
    """As OmegaConf has it: an object with a state."""

    def __getstate__(self) -> dict[str, Any]:
        return {"_content": {"lr": 1}, "_metadata": None}


class HistoryBuffer:
    """As mmengine has it: its state names its methods by getattr."""

    def __init__(self) -> None:
        self.__dict__.update(_log_history=np.array([1.0]), _statistics_methods={"max": Method()})


class Method:
    def __reduce__(self) -> Any:
        return (getattr, (HistoryBuffer, "__init__"))


ELSEWHERE = {
    "yacs.config": CfgNode,
    "omegaconf.dictconfig": DictConfig,
    "mmengine.logging.history_buffer": HistoryBuffer,
}


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above under the names of packages that need not be installed, while a file is written."""
    for name, kind in ELSEWHERE.items():
        words = name.split(".")
        for depth in range(len(words)):  # the packages around it
            package = ".".join(words[: depth + 1])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[name], kind.__name__, kind)
        monkeypatch.setattr(kind, "__module__", name)


@pytest.mark.parametrize(
    ("wrapper", "make"),
    [
        pytest.param("state_dict", lambda: {"args": argparse.Namespace(lr=1.0), "epoch": 3}, id="FasterViT"),
        pytest.param("model", lambda: {"args": DictConfig(), "optimizer": {}}, id="BiFormer with OmegaConf"),
        pytest.param("model", lambda: {"config": CfgNode(LR=1, MODEL=CfgNode(NAME="x"))}, id="Agent and InLine"),
        pytest.param("state_dict", lambda: {"message_hub": {"loss": HistoryBuffer()}}, id="mmengine"),
        pytest.param(
            "model", lambda: {"best": np.float64(81.3), "log": np.arange(3), "n": np.int64(2)}, id="numbers of NumPy"
        ),
    ],
)
def test_harmless_types_of_published_files(foreign: None, wrapper: str, make: Any) -> None:
    torch.save({wrapper: STATE, **make()}, "published.pth")
    for name in ELSEWHERE:  # reading needs no package of theirs
        sys.modules.pop(name)
    assert is_state(read_state_dict("published.pth"))
    content = read_checkpoint("published.pth")
    assert not any(isinstance(value, np.generic | np.ndarray) for value in content.values())


def test_files_of_numpy_1(foreign: None) -> None:
    """The reconstruction of arrays lived in another module then."""
    torch.save({"model": STATE, "best": np.float64(1.5)}, "new.pth", _use_new_zipfile_serialization=False)
    old = Path("new.pth").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    Path("old.pth").write_bytes(old)
    assert is_state(read_state_dict("old.pth"))


# Malice ----------------------------------------------------------------------------------------------------------


class Bomb:
    """Any call of any function, as pickles can ask for it."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def hidden_under(module: str, name: str) -> bytes:
    """A pickle that calls `module.name` with the path of the file to create."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x08\x00\x00\x00exploded\x85R."


MALICIOUS = {
    "a plain call": lambda: pickle.dumps({"state_dict": Bomb(Path.touch, Path("exploded"))}, 2),
    "a shell": lambda: pickle.dumps({"state_dict": Bomb(os.system, "touch exploded")}, 2),
    "evaluated text": lambda: pickle.dumps({"state_dict": Bomb(eval, "open('exploded', 'w')")}, 2),
    "inside an allowed type's module": lambda: hidden_under("argparse", "open"),
    "behind an allowed type's name": lambda: hidden_under("argparse", "Namespace.__init__.__globals__"),
    "an allowed name of another module": lambda: hidden_under("evil", "Namespace"),
    "through getattr": lambda: (
        b"\x80\x02c__builtin__\ngetattr\ncargparse\n_os\nX\x06\x00\x00\x00system\x86R"
        b"X\x0e\x00\x00\x00touch exploded\x85R."
    ),
    "what getattr returns": lambda: (
        b"\x80\x02c__builtin__\ngetattr\ncargparse\nNamespace\nX\x08\x00\x00\x00__init__\x86RX\x08\x00\x00\x00exploded\x85R."
    ),
    "a type's state that is code": lambda: pickle.dumps(
        {"state_dict": {}, "args": Bomb(argparse.Namespace, Bomb(os.system, "touch exploded"))}, 2
    ),
}


@pytest.mark.parametrize("kind", MALICIOUS)
@pytest.mark.parametrize("container", ["zip", "bare"])
def test_malicious_pickles_are_refused_and_do_nothing(kind: str, container: str) -> None:
    code = MALICIOUS[kind]()
    if container == "bare":
        Path("bomb.pth").write_bytes(code)
    else:
        torch.save(STATE, "good.pth")
        with zipfile.ZipFile("good.pth") as good, zipfile.ZipFile("bomb.pth", "w") as bad:
            for entry in good.namelist():
                bad.writestr(entry, code if entry.endswith("data.pkl") else good.read(entry))
    with pytest.raises(CheckpointError, match=r"^checkpoint bomb.pth: (cannot be read|holds)") as caught:
        read_checkpoint("bomb.pth")
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists(), "code inside a checkpoint ran"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


# An array of objects whose bytes are addresses, which NumPy would follow
ADDRESSES = (
    b"cnumpy\nndarray\n((K\x02tcnumpy\ndtype\n(" + text("O") + b"tR"
    b"c_codecs\nencode\n(" + text("A" * 16) + text("latin1") + b"tRtR"
)


@pytest.mark.parametrize("call", ["collections\nOrderedDict", "collections\nCounter", "torch\nSize"])
def test_no_address_in_a_file_is_followed(call: str) -> None:
    """In a fork, which would die of it; beside weights that are good."""
    torch.save({"model": STATE}, "good.pth")
    with zipfile.ZipFile("good.pth") as good, zipfile.ZipFile("evil.pth", "w") as bad:
        for entry in good.namelist():
            content = good.read(entry)
            if entry.endswith("data.pkl"):
                content = content[:-1] + b"(" + text("args") + b"c" + call.encode() + b"\n(" + ADDRESSES + b"tRu."
            bad.writestr(entry, content)

    def read() -> None:
        try:
            print(list(read_checkpoint("evil.pth")))
        except UnsafeError as error:
            print(error)

    fork = Fork(read, Path("log.txt"))
    assert fork.wait() == 0, "the process was killed"
    assert "checkpoint evil.pth: cannot be read (it contains Python objects" in fork.printed()


def test_compressed_files_are_refused() -> None:
    torch.save({"model": {"w": torch.zeros(1_000_000)}}, "good.pth")
    with zipfile.ZipFile("good.pth") as good, zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as bad:
        for entry in good.namelist():
            bad.writestr(entry, good.read(entry))
    assert Path("bomb.pth").stat().st_size < 10_000
    with pytest.raises(CheckpointError, match=r"it is a compressed zip archive, which PyTorch never writes"):
        read_checkpoint("bomb.pth")


def test_the_bomb_would_go_off() -> None:
    """With Python's own pickle it does: the tests above are about something."""
    Path("bomb.pkl").write_bytes(MALICIOUS["a shell"]())
    subprocess.run([sys.executable, "-c", "import pickle; pickle.load(open('bomb.pkl', 'rb'))"], check=True)
    assert Path("exploded").exists()


def test_stand_ins_keep_nothing() -> None:
    torch.save({"state_dict": STATE, "args": argparse.Namespace(secret=1)}, "a.pth")
    args = read_checkpoint("a.pth")["args"]
    assert not isinstance(args, argparse.Namespace)
    assert not vars(args)


def test_the_allow_list_is_gone_after_reading() -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": STATE, "args": argparse.Namespace()}, "a.pth")
    read_checkpoint("a.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load("a.pth", weights_only=True)


# Damage ----------------------------------------------------------------------------------------------------------


# name -> what is left of (a zip, an old-style pickle, safetensors), and what is said of it
DAMAGED = {
    "empty.pth": (lambda *_: b"", "the file is empty"),
    "empty.safetensors": (lambda *_: b"", "the file is empty"),
    "page.pth": (lambda *_: b"\n <!DOCTYPE html><html>confirm</html>", "it is a web page, not weights"),
    "page.safetensors": (lambda *_: b"<html>404</html>", "it is a web page, not weights"),
    "cut.pth": (lambda zipped, *_: zipped[: len(zipped) // 2], "it is cut short: download or copy it again"),
    "cut_old.pth": (lambda _, old, __: old[: len(old) // 2], "cannot be read"),
    "cut_old_early.pth": (lambda _, old, __: old[:3], "cannot be read"),
    "cut.safetensors": (lambda *found: found[2][:-5], "cannot be read"),
    "cut_head.safetensors": (lambda *found: found[2][:20], "cannot be read"),
    "huge_head.safetensors": (lambda *found: struct.pack("<Q", 1 << 60) + found[2][8:], "cannot be read"),
    "longer.safetensors": (lambda *found: found[2] + b"more", "it is 4 bytes longer than its list of tensors says"),
    "pointer.pth": (lambda *_: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "noise.pth": (lambda *_: bytes(range(1, 256)) * 9, "not a file of weights: it begins with 01 02 03 04"),
    "refused.pth": (lambda *_: b'{"error": "denied"}\n', r"""it is JSON, not weights: '\{"error": "denied"\}'"""),
    "busy.pth": (
        lambda *_: "Überlastet,\nbitte warten".encode(),
        "it is text, not weights: 'Überlastet, bitte",
    ),
    "commented.pth": (lambda *_: b"<!-- saved --><html><body>log in", "it is a web page, not weights"),
    "marked.pth": (lambda *_: b"\xef\xbb\xbf<!DOCTYPE html><html>", "it is a web page, not weights"),
    "packed.pth": (lambda zipped, *_: gzip.compress(zipped), "it is compressed with gzip"),
    "archive.pth": (lambda *_: b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(250), "it is a tar archive"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_one_clear_line(name: str) -> None:
    damage, reason = DAMAGED[name]
    torch.save(STATE, "whole.pth")
    torch.save(STATE, "old.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, "whole.safetensors")
    Path(name).write_bytes(damage(*(Path(n).read_bytes() for n in ("whole.pth", "old.pth", "whole.safetensors"))))
    with pytest.raises(CheckpointError, match=rf"^checkpoint {name}: .*{reason}") as caught:
        read_state_dict(name)
    assert "\n" not in str(caught.value)


def test_files_without_weights() -> None:
    torch.save({"epoch": 1, "meta": {}}, "none.pth")
    with pytest.raises(CheckpointError, match=r"none.pth: holds no weights \(its keys: epoch, meta\)"):
        read_state_dict("none.pth")
    torch.save([1], "list.pth")
    with pytest.raises(CheckpointError, match=r"list.pth: holds a list, expected a dictionary"):
        read_checkpoint("list.pth")
    with pytest.raises(CheckpointError, match=r"nowhere.pth: no such file"):
        read_checkpoint("nowhere.pth")
    with pytest.raises(CheckpointError, match=r": no such file"):
        read_checkpoint(".")


# Containers and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "model"])
def test_the_format_is_found_from_the_content(name: str) -> None:
    save_file(STATE, name)
    assert is_state(read_state_dict(name))
    torch.save(STATE, name)
    assert is_state(read_state_dict(name))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [(torch.eye(2).to_sparse(), "is sparse"), (torch.empty(2, device="meta"), r"has no values \(device meta\)")],
    ids=["sparse", "meta"],
)
def test_tensors_of_unusual_types_are_refused(tensor: torch.Tensor, reason: str) -> None:
    torch.save({**STATE, "odd": tensor}, "odd.pth")
    with pytest.raises(CheckpointError, match=rf"^checkpoint odd.pth: odd {reason}"):
        read_state_dict("odd.pth")


def test_wrapper_key() -> None:
    other = {key: value + 1 for key, value in STATE.items()}
    torch.save({"model": other, "state_dict_ema": STATE}, "two.pth")
    assert is_state(read_state_dict("two.pth", wrapper_key="state_dict_ema"))
    assert not is_state(read_state_dict("two.pth"))
    with pytest.raises(CheckpointError, match=r"holds no weights under 'ema' \(its keys: model, state_dict_ema\)"):
        read_state_dict("two.pth", wrapper_key="ema")
    torch.save(collections.OrderedDict(STATE), "flat.pth")
    assert is_state(read_state_dict("flat.pth", wrapper_key="state_dict"))


def test_prefixes() -> None:
    def names(*keys: str, **options: bool) -> list[str]:
        return list(strip_prefixes({key: torch.zeros(1) for key in keys}, **options))

    assert names("module._orig_mod.model.a", "module._orig_mod.model.b") == ["a", "b"]
    assert names("model.a", "b") == ["model.a", "b"]
    assert names("backbone.model.a", "neck.b") == ["a"]
    assert names("module.backbone.a", "module.head.b") == ["a"]
    assert names("backbone.a", "head.b", dense=False) == ["backbone.a", "head.b"]
    authors = ("backbone.stages.0.op_list.0.conv.weight", "head.op_list.0.conv.weight")  # a classifier's
    assert names(*authors) == list(authors)
    assert names() == []
