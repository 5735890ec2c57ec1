"""The examples in the documents run: Python blocks, docstring examples, and the commands' configs and models."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from timm.models import model_entrypoint

from hybridzoo.checkpoints import cards, markdown, store

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_EXAMPLES = sorted(
    "hybridzoo." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for room in ("backbones", "checkpoints", "kernels", "layers", "train")
    for file in (ROOT / room).rglob("*.py")
    if ">>> " in file.read_text()
)


def _blocks(kind: str) -> list:
    """The documents' code blocks in one language, named by file and number."""
    found = []
    for file in DOCUMENTS:
        for number, block in enumerate(re.findall(rf"```{kind}\n(.*?)```", file.read_text(encoding="utf-8"), re.S), 1):
            found.append(pytest.param(block, id=f"{file.relative_to(ROOT)} {number}"))
    return found


TESTED_ELSEWHERE = ("bench.md", "export.md", "show.md", "with_other_libraries.md")


@pytest.mark.parametrize("block", [p for p in _blocks("python") if not any(name in p.id for name in TESTED_ELSEWHERE)])
def test_examples_run(block, tmp_path, monkeypatch):
    if "pretrained=True" in block:  # all of it but the download
        file = tmp_path / "dinat_mini_in1k_224.pth"
        torch.save(timm.create_model("dinat_mini").state_dict(), file)
        monkeypatch.setattr(store, "download", lambda *args, **kwargs: file)
        monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_public_layers_and_kernels_have_examples():
    assert {"hybridzoo.kernels.neighborhood.api", "hybridzoo.layers.agent_attention"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_names_configs_that_exist():
    from hybridzoo.train.names import list_configs

    own = {"work_dirs", "digits_model", "hf-hub"}  # the folder of runs, a folder for the hub, the hub
    named = set(re.findall(r"hybridzoo (?:train|test|predict) ([\w-]+)", README)) - own
    assert len(named) >= 4
    assert named <= {*list_configs(), *timm.list_models()}


def test_table_of_models_equals_the_cards():
    assert (ROOT / "docs/models.md").read_text() == markdown.page(), "make docs/models.md"
    ours = {name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("hybridzoo.")}
    assert {card.model for card in cards()} == ours


def test_readme_names_every_family():
    for family in {card.family for card in cards()}:
        assert f"`{family.removesuffix('_isotropic')}_" in README or f"`{family}_" in README, family


def test_readme_pictures_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_no_file_has_a_path_of_a_local_machine():
    for file in ROOT.glob("*.md"):
        assert not re.search(r"/(home|root|tmp|Users|work)/", file.read_text()), file.name


LINES = [line.split("#")[0].strip() for (block,) in (p.values for p in _blocks("sh")) for line in block.splitlines()]


@pytest.mark.parametrize("line", sorted({line for line in LINES if re.search(r"\bhybridzoo \w", line)}))
def test_the_commands_in_the_documents_are_valid(line):
    """Every command and option exists, and every value has the right type; nothing is run."""
    from typer.main import get_command

    from hybridzoo.train.cli import app, spread_options

    words = spread_options(shlex.split(line[re.search(r"\bhybridzoo \w", line).start() :])[1:])
    group, command = None, get_command(app)
    while hasattr(command, "commands"):
        group, command, words = command, command.commands[words[0]], words[1:]
    assert group is not None
    command.make_context(command.name, words)
