"""Linear layers in int8, by torchao: about a quarter of their size, at a small loss of accuracy."""

from __future__ import annotations

import torch
from torch import nn

from hybridzoo.train.errors import UserError, reason
from hybridzoo.train.export.comparing import TOLERANCE, difference
from hybridzoo.train.export.sources import Source

WAYS = ("weights", "dynamic")
CARRY = ("onnx", "pt2")  # files of OpenVINO and TorchScript do not become smaller; aoti was not tested


def check(way: str, to: str) -> None:
    """Raise UserError if a format does not store int8."""
    if to not in CARRY:
        raise UserError(f"--int8 {way}: --to {to} does not keep int8; the formats that do: {', '.join(CARRY)}")


def quantize(source: Source, way: str) -> float:
    """Quantize the weights of a network's linear layers to int8, with a scale for each output channel, in place.

    Args:
        source: from `sources`; afterwards its metadata has `int8`.
        way: "weights": products are computed in float32. "dynamic": inputs are rounded to int8 too, with a scale for
            each token, and products are computed in integers.

    Returns:
        The largest change of an output for a noise image of the usual size, relative to its standard deviation.

    Raises:
        UserError: there is no linear layer, or torchao does not support how the network uses a layer's weight.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    name = source.metadata["model"]
    if not any(isinstance(module, nn.Linear) for module in source.network.modules()):
        raise UserError(f"--int8 {way}: {name} has no linear layer (nn.Linear), the only kind that becomes int8")
    image = source.image(*source.size, 1)
    expected = source.run(image)
    config = Int8WeightOnlyConfig() if way == "weights" else Int8DynamicActivationInt8WeightConfig()
    try:
        with torch.no_grad():
            quantize_(source.network, config)
        found = source.run(image)
    except Exception as error:  # torchao raises many types of exceptions for unsupported operators
        raise UserError(f"--int8 {way}: torchao cannot quantise {name} ({reason(error)})") from error
    source.graphs.clear()
    source.metadata["int8"] = way
    return max(difference(*pair) for pair in zip(expected, found, strict=True))


def tolerance(way: str, change: float) -> float:
    """The allowed difference between a file and the quantized network, see `TOLERANCE`.

    Rounding of inputs is not continuous: a difference in the last bit (another order of sums) may become a whole step
    of 1/127. With "dynamic", file and network each differ from the float32 network by about `change`, so they differ
    from each other by at most twice as much.
    """
    return max(TOLERANCE, 2 * change) if way == "dynamic" else TOLERANCE
