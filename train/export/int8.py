"""Linear layers in eight bits, by torchao: about a quarter of their size, for some accuracy."""

from __future__ import annotations

import torch
from torch import nn

from hybridzoo.train.errors import UserError, reason
from hybridzoo.train.export.comparing import TOLERANCE, difference
from hybridzoo.train.export.sources import Source

WAYS = ("weights", "dynamic")
CARRY = ("onnx", "pt2")  # OpenVINO's and TorchScript's files become no smaller; aoti: not known


def check(way: str, to: str) -> None:
    """Raise UserError where a format's files would not hold int8."""
    if to not in CARRY:
        raise UserError(f"--int8 {way}: --to {to} does not keep int8; the formats that do: {', '.join(CARRY)}")


def quantize(source: Source, way: str) -> float:
    """Give the linear layers of a network weights of eight bits, a scale for each output channel, in place.

    Args:
        source: of `sources`; its metadata say `int8` afterwards.
        way: "weights": products stay in float32. "dynamic": inputs are rounded to eight bits too, with a scale for each
            token, and products are of whole numbers.

    Returns:
        Largest change of an output at noise of the usual size, of the output's standard deviation.

    Raises:
        UserError: no linear layer, or torchao cannot do what the network does with a layer's weight.
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
    except Exception as error:  # whatever torchao raises of an operator that it has no int8 form of
        raise UserError(f"--int8 {way}: torchao cannot quantise {name} ({reason(error)})") from error
    source.graphs.clear()
    source.metadata["int8"] = way
    return max(difference(*pair) for pair in zip(expected, found, strict=True))


def tolerance(way: str, change: float) -> float:
    """How far a file may be from the quantised network, see `TOLERANCE`.

    Rounding of inputs is no smooth function: what another order of sums changes in the last bit may change a whole step
    of 1/127. In the "dynamic" way, file and network are each about `change` from the float32 network, so twice as far
    from each other at most.
    """
    return max(TOLERANCE, 2 * change) if way == "dynamic" else TOLERANCE
