"""AsCAN: no weights were published, so there are no names to convert."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`: our own names, unchanged."""
    return dict(state_dict)
