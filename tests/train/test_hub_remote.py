"""`hybridzoo hub push` and `hf-hub:USER/NAME`, with a hub on this machine, and what may go wrong with it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import TOKEN, Hub
from PIL import Image

from hybridzoo.__main__ import main
from hybridzoo.train import engine, provenance, trained
from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.hub import export as exporting
from hybridzoo.train.hub import remote
from hybridzoo.train.weights import find_weights

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a small classifier."""
    from mmengine.registry import MODELS

    config = load_config("finetune", model="test_vit", img_size=64)
    config.model.num_classes = 2
    engine.prepare(config, ("model",))
    torch.manual_seed(1)
    state = MODELS.build(dict(config.model)).state_dict()
    folder = tmp_path_factory.mktemp("run")
    meta = {"setup": trained.describe(config), "class_names": ["cat", "dog"], "task": "classification"}
    torch.save({"meta": meta, "state_dict": state}, folder / "final.pth")
    return folder


@pytest.fixture(scope="module")
def model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporting.export(run, tmp_path_factory.mktemp("exported") / "model").folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*argv: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*map(str, argv)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_pushed_folder_can_be_downloaded(hub: Hub, call: Call, model: Path, tmp_path: Path) -> None:
    (model / ".secret").write_text("mine")
    code, out, err = call("hub", "push", model, "--repo-id", "me/animals", "--private")
    assert (code, out.strip()) == (0, f"{hub.url}/me/animals"), err
    there = hub.files["me/animals"]
    assert sorted(there) == ["README.md", "config.json", "model.safetensors"]
    assert hub.private == {"me/animals": True}
    assert there["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert b"hf-hub:me/animals" in there["README.md"]
    assert b"USER/NAME" not in there["README.md"]
    assert "USER/NAME" in (model / "README.md").read_text(), "the folder itself stays as it is"

    Image.effect_noise((70, 90), 80).save("photo.png")
    code, out, err = call("predict", "hf-hub:me/animals", "photo.png", "--no-draw")
    assert code == 0, err
    assert "cat" in out
    images = torch.rand(1, 3, 64, 64)
    ours = engine.build_for_inference(None, "hf-hub:me/animals", "cpu")
    theirs = timm.create_model("hf-hub:me/animals", pretrained=True).eval()
    assert torch.equal(ours(images), theirs(images))


def test_push_exports_a_run_and_can_be_repeated(hub: Hub, call: Call, run: Path) -> None:
    for count in (1, 2):
        code, _, err = call("hub", "push", run, "--repo-id", "me/animals", "--license", "mit")
        assert code == 0, err
        assert hub.commits == count
    assert b"license: mit" in hub.files["me/animals"]["README.md"]
    assert b"# me/animals" in hub.files["me/animals"]["README.md"]
    assert [path.name for path in run.iterdir()] == ["final.pth"]


@pytest.fixture
def xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol that huggingface_hub prefers for large files; other tests use LFS, its other protocol."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)


def test_large_files_go_through_xet(hub: Hub, xet: None, call: Call, model: Path) -> None:
    code, out, err = call("hub", "push", model, "--repo-id", "me/animals")
    assert (code, out.strip()) == (0, f"{hub.url}/me/animals"), err
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert hub.files["me/animals"]["model.safetensors"] == digest.encode()
    assert not hub.large
    assert hub.shards
    assert sum(map(len, hub.xorbs.values())) > 0.5 * (model / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("place", "status", "says"),
    [
        ("xet-write-token", 401, "401, it needs a login"),
        ("xet-write-token", 403, "403, this login is not allowed"),
        ("xet-write-token", 404, "404, there is no such repository"),
        ("/v1/xorbs", 413, "413, it does not accept files of this size"),
        ("/v2/shards", 200, "Invalid response"),
    ],
)
def test_errors_of_xet_are_one_line(
    hub: Hub, xet: None, call: Call, model: Path, place: str, status: int, says: str
) -> None:
    hub.faults[place] = status
    code, out, err = call("hub", "push", model, "--repo-id", "me/animals")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: me/animals: cannot upload to 127\S+: .*{says}.*\n", err), err
    assert not hub.commits


FAULTS = [
    ("repos/create", 401, "needs a login.*--token, set HF_TOKEN"),
    ("repos/create", 403, "not allowed to do this"),
    ("preupload", 404, "404.*no such repository"),
    ("commit/", 409, "409, somebody else is changing the repository.*try again"),
    ("commit/", 413, "413, it does not accept files of this size"),
    ("repos/create", 500, "500, it answers with an error"),
    ("repos/create", 0, "no connection"),
]


@pytest.mark.parametrize(("place", "status", "says"), FAULTS, ids=[f"{p} {s}" for p, s, _ in FAULTS])
def test_errors_of_the_hub_are_one_line(hub: Hub, call: Call, model: Path, place: str, status: int, says: str) -> None:
    hub.faults[place] = status
    if "create" in place and status in (401, 403):
        hub.faults["/api/models/me/animals"] = status  # huggingface_hub looks whether it is there already
    code, out, err = call("hub", "push", model, "--repo-id", "me/animals")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: me/animals: cannot upload to 127.+\n", err), err
    assert re.search(says, err), err
    assert not hub.commits
    assert TOKEN not in err


def test_no_network_and_a_wrong_login(hub: Hub, call: Call, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = call("hub", "push", model, "--repo-id", "me/animals", "--token", "hf_wrong")
    assert code == 2
    assert "401, it needs a login" in err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = call("hub", "push", model, "--repo-id", "me/animals")
    assert code == 2
    assert re.fullmatch(r"error: me/animals: cannot upload to 127.0.0.1:9: no connection .*\n", err), err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["push", "nowhere", "--repo-id", "me/x"], "nowhere: no such folder or run"),
        (["push", "MODEL", "--repo-id", "animals"], "--repo-id 'animals': a repository is called USER/NAME"),
        (["push", "MODEL", "--repo-id", "me/../x"], "a repository is called USER/NAME"),
        (["push", "MODEL"], "--repo-id"),
        (["push", "MODEL", "--repo-id", "me/x", "--license", "mit"], "has a model card, edit that"),
    ],
    ids=" ".join,
)
def test_bad_input(hub: Hub, call: Call, model: Path, argv: list[str], says: str) -> None:
    code, out, err = call("hub", *[str(model) if word == "MODEL" else word for word in argv])
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err), err
    assert says in err
    assert not hub.files


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf-hub:me/nothing", "404, there is no such repository"),
        ("hf-hub:animals", "a repository is called USER/NAME"),
        ("hf-hub:me/empty", r"holds no config\.json"),
        ("hf-hub:me/half", "holds none of model.safetensors"),
    ],
)
def test_unknown_repositories(hub: Hub, name: str, says: str) -> None:
    hub.files |= {"me/empty": {}, "me/half": {"config.json": b"{}"}}
    with pytest.raises(UserError, match=says) as caught:
        remote.bring(name)
    assert "\n" not in str(caught.value)


def test_weights_from_the_hub_are_named_with_their_repository(hub: Hub, model: Path) -> None:
    """What starts from them says so in its card; their licence is on their own card."""
    remote.push(model, "me/animals")
    weights = find_weights("hf-hub:me/animals")
    start = provenance.start_of(weights, load_config("finetune", model="test_vit"))[0]
    assert start == {"name": "me/animals", "licence": "unknown", "url": "https://huggingface.co/me/animals"}
    assert provenance.start_of(model / "model.safetensors", load_config("finetune", model="test_vit"))[0]["url"] == ""
    with pytest.raises(UserError, match="a repository is called USER/NAME"):
        find_weights("hf-hub:animals")


def test_downloaded_folders_work_without_a_network(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.push(model, "me/animals")
    first = remote.bring("hf-hub:me/animals")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert remote.bring("hf-hub:me/animals") == first
    with pytest.raises(UserError, match=r"me/other: .*no connection"):
        remote.bring("hf-hub:me/other")
