"""Errors that the user can correct, and explanations of libraries' errors."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator

from hybridzoo.train.plain import printable


class UserError(Exception):
    """Bad input: the message is one line that names the argument, the value and what to do instead.

    The command line prints it and exits with code 2. All other errors are our bugs and keep their traceback. File names
    may contain anything: characters that are not visible are escaped.
    """

    def __init__(self, message: str = "") -> None:
        name = type(self).__name__
        if message.startswith(
            f"Caught {name} in "
        ):  # from a worker of PyTorch's loader: the message is the last line of its traceback
            message = message.strip().rpartition(f"{name}: ")[2]
        super().__init__(printable(message))


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM); its exit status is 143, as a shell has it.

    Args:
        message: one line, which the command line prints.
    """

    def __init__(self, message: str) -> None:
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        return self.message


_NOT_REGISTERED = re.compile(r"(?P<name>\S+) is not in the (?:\w+::)?(?P<kind>[\w ]+) registry")
_NO_GPU = ("No CUDA GPUs are", "Torch not compiled with CUDA", "Found no NVIDIA driver", "invalid device ordinal")


def explain(error: BaseException) -> str | None:
    """One line that explains an error and says what to do, or None for a bug of ours.

    Errors of torch and of the operating system are recognised by name and text, so that nothing is imported.
    """
    text = str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, UserError):
        return text
    if type(error).__module__.startswith("hybridzoo.checkpoints"):
        return text
    if "OutOfMemoryError" in kinds:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return f"out of GPU memory{f' (asked for {asked[1]})' if asked else ''}: {LESS_MEMORY}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"out of memory: {LESS_MEMORY}, or fewer loader workers"
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return (
            "a process that loads images died, probably because memory (in a container: shared memory) ran out: use "
            "fewer workers, or none (train_dataloader.num_workers=0)"
        )
    if "Expected more than 1 value per channel" in text:
        return "BatchNorm needs more than one value per channel: use a batch of at least two images, or larger images"
    outside = re.search(r"Target (-?\d+) is out of bounds", text)
    if outside is not None or "device-side assert" in text:
        label = f"the label {outside[1]}" if outside else "a label, most likely,"
        return f"{label} is outside the model's classes: correct the data, or model.num_classes"
    if any(sign in text for sign in _NO_GPU):
        return f"no such GPU here ({text.splitlines()[0]}): leave the device out, or use cpu"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


LESS_MEMORY = "use a smaller batch (train_dataloader.batch_size), smaller images, or mixed precision (--amp)"


def reason(error: BaseException) -> str:
    """The first line of a library's error; without a text, the line of code that raised it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if text.strip():
        return text.strip().splitlines()[0]
    raised = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {raised[-1].line}" if raised else type(error).__name__


@contextlib.contextmanager
def building(place: str) -> Iterator[None]:
    """Turn errors while something is built from a config into errors of the config.

    Raises:
        UserError: names the place in the config and gives the library's reason.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AssertionError, AttributeError) as error:
        said = explain(error)
        unknown = _NOT_REGISTERED.search(str(error))
        if unknown is not None:
            said = f"config {place}: there is no {unknown['kind']} called {unknown['name'].strip(chr(39))}"
        raise UserError(said or f"config {place}: {reason(error)}") from error
