"""The Dockerfile follows the usual rules, and CITATION.cff follows its format."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
ROOMS = ("backbones", "checkpoints", "configs", "hybridzoo", "kernels", "layers", "train")
KEYS = {
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords"),
    *("license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact"),
    *("repository-code", "title", "type", "url", "version"),
}


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def of(steps: list[tuple[str, str]], kind: str) -> list[str]:
    return [text for name, text in steps if name == kind]


def test_the_base_is_an_argument_with_a_fixed_version(steps):
    arguments = dict(text.split("=", 1) for text in of(steps, "ARG"))
    assert steps[0][0] == "ARG"
    assert of(steps, "FROM") == ["${BASE}"]
    name, _, tag = arguments["BASE"].partition(":")
    assert name
    assert re.search(r"\d+\.\d+", tag), "a tag with a version"
    assert "latest" not in (ROOT / "Dockerfile").read_text()
    assert arguments["TORCH_INDEX"].endswith("/cpu")


def test_package_caches_are_removed(steps):
    for text in of(steps, "RUN"):
        commands = [shlex.split(part) for part in text.split("&&")]
        installs = [words for words in commands if words[:2] == ["apt-get", "install"]]
        for words in installs:
            assert "--no-install-recommends" in words
            assert "--yes" in words
            assert ["apt-get", "update"] in commands
            assert ["rm", "-rf", "/var/lib/apt/lists/*"] in commands
        assert not [words for words in commands if words[0] in ("sudo", "curl", "wget", "cd", "pip")]
        assert not [words for words in commands if words[:2] in (["apt-get", "upgrade"], ["apt-get", "dist-upgrade"])]
    assert "PIP_NO_CACHE_DIR=1" in of(steps, "ENV")[0]
    assert not of(steps, "ADD")


def test_every_installation_is_pinned(steps):
    installs = [part for text in of(steps, "RUN") for part in text.split("&&") if "pip install" in part]
    assert len(installs) >= 3
    assert all("--constraint constraints.txt" in part or "--requirement /tmp/torch.txt" in part for part in installs)


def test_extras_and_packages_of_the_dockerfile_exist(steps):
    arguments = dict(text.split("=", 1) for text in of(steps, "ARG"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(arguments["EXTRAS"].split(",")) <= set(extras)
    fixed = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "torchvision", "opencv-python-headless"} <= fixed
    assert "'^(torch|torchvision)=='" in "".join(of(steps, "RUN"))


def test_it_runs_as_an_ordinary_user_who_owns_the_working_folder(steps):
    assert of(steps, "USER") == ["zoo"]
    names = [name for name, _ in steps]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name in ("RUN", "COPY"))
    made = next(text for text in of(steps, "RUN") if "useradd" in text)
    assert "install --directory --owner zoo --group zoo /workspace" in made
    assert of(steps, "WORKDIR")[-1] == "/workspace"
    assert all(folder.startswith("/") for folder in of(steps, "WORKDIR"))


def test_it_starts_the_command_line_and_runs_it_once(steps):
    assert of(steps, "ENTRYPOINT") == ['["hybridzoo"]']  # as a list: signals reach the process
    assert of(steps, "CMD") == ['["--help"]']
    assert "hybridzoo --help" in of(steps, "RUN")[-1]


def test_copied_files_exist_and_are_not_ignored(steps):
    """Dependencies come before code, every room is copied, and .dockerignore lets just that pass."""
    sources = [word for text in of(steps, "COPY") for word in text.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert set(ROOMS) <= set(sources)
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(sources)
    assert any(fnmatch.fnmatch("train/__pycache__", rule) for rule in rules[1:])
    assert sources.index("constraints.txt") < min(sources.index(room) for room in ROOMS)


def test_docker_check_reports_nothing():
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("needs a docker engine")
    done = subprocess.run(["docker", "build", "--check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_file_is_valid():
    """Citation File Format 1.2.0: four required keys, authors as persons or entities."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert set(cited) <= KEYS
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] in ("software", "dataset")
    assert cited["authors"]
    for author in cited["authors"]:
        assert author.get("name") or (author.get("family-names") and author.get("given-names"))
    assert all(isinstance(word, str) for word in cited["keywords"])
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{cited["version"]}"' in project
    assert f'license = "{cited["license"]}"' in project
