"""How the command line treats a person: at once, in one line, without a traceback."""

import resource
import subprocess
import sys

import timm
from timm.models import model_entrypoint

from hybridzoo.train import names


def test_help_and_a_misspelt_name_answer_at_once():
    """Seconds of CPU time in a process of its own, start included: importing timm alone takes several times as much."""

    def seconds(*argv: str) -> tuple[float, int]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = subprocess.run([sys.executable, "-m", "hybridzoo", *argv], capture_output=True).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, code

    for argv, code in (
        (["--help"], 0),
        (["train", "--help"], 0),
        (["info", "biformer_tinny"], 2),
        (["info", "resnet_50"], 2),
        (["train", "biformer_tiny_digit"], 2),
        (["train", "biformer_tiny_digits", "--weights", "biformer_tinny"], 2),
        (["checkpoints", "download", "biformer_tinny"], 2),
        (["trian"], 2),
        (["list"], 0),
        (["info", "biformer_tiny"], 0),
    ):
        spent, returned = seconds(*argv)
        assert returned == code, argv
        assert spent < 0.7, (argv, spent)


def test_the_names_known_at_once_are_those_that_timm_registers():
    registered = {name: model_entrypoint(name).__module__.startswith("hybridzoo.") for name in timm.list_models()}
    assert names.our_models() == [name for name, ours in registered.items() if ours], "in timm's order"
    assert names.timm_models() == {name for name in timm.list_models(module="") if not registered[name]}


def test_our_command_registers_the_models_when_it_needs_them(tmp_path):
    """`python -m hybridzoo` knows no model at first; any other process knows them all once hybridzoo is imported."""
    program = "import sys; import hybridzoo, timm; sys.exit(not timm.is_model('biformer_tiny'))"
    script = tmp_path / "train.py"
    script.write_text(program)
    ours = subprocess.run([sys.executable, str(script), "-m", "hybridzoo"])
    assert ours.returncode == 0, "somebody's own program, whatever its options are called"


def test_the_command_knows_our_models_where_it_composes_a_run():
    """Its process registers them late, and a recipe asks for them before any verb has imported the engine."""
    program = "import sys; sys.argv = ['hybridzoo']; from hybridzoo.train import compose"
    program += "; compose.check_network('maxvit_tiny')"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
