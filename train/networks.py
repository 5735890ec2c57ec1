"""Creates timm networks by name, for a classifier or a backbone; a wrong name or argument is a one-line error."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

import hybridzoo.backbones  # noqa: F401 - registers the models with timm
from hybridzoo.train.errors import UserError, reason
from hybridzoo.train.names import suggest

_UNKNOWN_ARGUMENT = re.compile(r"unexpected keyword argument '(\w+)'")


def create(
    place: str, name: str, arguments: dict[str, Any], **settled: Any
) -> Any:  # Any: attributes that every timm model has
    """`timm.create_model`, with readable errors.

    Args:
        place: the network's key in the config, for messages: `model` or `model.backbone`.
        name: our, timm's, or another package's registered name.
        arguments: the network's arguments in the config.
        settled: further arguments that are not in the config.

    Raises:
        UserError: unknown name or tag; an argument that this network does not have, or an invalid value.
    """
    check_name(name)
    arch = name.partition(".")[0]
    listed = ", ".join(f"{place}.{key}={value!r}" for key, value in arguments.items() if value is not None)
    try:
        get_pretrained_cfg(name, allow_unregistered="." not in name)
    except RuntimeError as error:
        raise UserError(f"model {name!r}: {arch} has no such tag; type: hybridzoo info {arch}") from error
    try:
        return timm.create_model(name, **settled, **arguments)
    except torch.OutOfMemoryError:
        raise
    except TypeError as error:
        unknown = _UNKNOWN_ARGUMENT.search(str(error))
        if unknown is None or unknown[1] not in arguments:
            raise _refused(name, listed, error) from error
        key = unknown[1]
        near = suggest(key, _takes(name), "leave it out")
        raise UserError(f"{place}.{key}={arguments[key]!r}: {name} has no such argument; {near}") from error
    except (ValueError, AssertionError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise _refused(name, listed, error) from error


def check_name(name: str) -> None:
    """Raise a UserError that suggests the nearest names, unless timm has the model; a tag may follow after a point."""
    arch = name.partition(".")[0]
    if not timm.is_model(arch):
        raise UserError(f"unknown model {name!r}: {suggest(arch, timm.list_models(), 'type: hybridzoo list')}")


def check(place: str, name: str, arguments: dict[str, Any]) -> None:
    """Find an unknown name or argument of a network within a second, without allocating memory; see `create`.

    Raises:
        UserError: see `create`. Some invalid values are found only there.
    """
    with torch.device("meta"):
        try:
            create(place, name, arguments)
        except UserError as error:
            if not isinstance(error.__cause__, RuntimeError | NotImplementedError) or "no such tag" in str(error):
                raise  # other errors may come from the meta device


def _takes(name: str) -> set[str]:
    """Names of a network's arguments, as far as its class lists them."""
    with torch.device("meta"):
        network = timm.create_model(name)
    parameters = inspect.signature(type(network).__init__).parameters
    rows = [vars(sys.modules[type(network).__module__]).get("VARIANTS", {}).get(name)]
    return {*parameters, *(field for row in rows if row is not None for field in vars(row))} - {"self"}


def _refused(name: str, listed: str, error: Exception) -> UserError:
    return UserError(f"{listed or name}: {name} cannot be built with these arguments; {reason(error)}")
