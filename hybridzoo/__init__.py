"""hybridzoo: hybrid convolution/attention vision backbones that work today.

Importing this package registers its models with timm and does nothing heavier:

>>> import timm, hybridzoo
>>> model = timm.create_model("biformer_tiny", num_classes=10)

In a process of its own command line (`hybridzoo ...`, `python -m hybridzoo ...`) the verbs that need the models import
them: help and a misspelt name are answered without the seconds that timm and torch take.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"
__all__ = ["__version__", "backbones"]


def _is_our_command() -> bool:
    """Whether this process was started as `hybridzoo ...` or as `python -m hybridzoo ...`."""
    program, words = sys.argv[0], sys.orig_argv
    if program == "-m":  # Python's word for "looking for the module to run"
        return words[words.index("-m") + 1 :][:1] == ["hybridzoo"] if "-m" in words else False
    return Path(program).stem == "hybridzoo"


IS_OUR_COMMAND = _is_our_command()  # asked now: Python changes the words once it has found the module to run

if not IS_OUR_COMMAND:
    from hybridzoo import backbones
