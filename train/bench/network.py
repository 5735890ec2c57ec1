"""Time and memory of one network."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn

from hybridzoo.checkpoints import cards
from hybridzoo.train import model_info, names, networks
from hybridzoo.train.bench import measuring
from hybridzoo.train.bench.rows import Row


class Network:
    """One of our or timm's networks with random weights, as `hybridzoo bench models` measures it.

    Args:
        name: of the network, with or without a tag.
        way: "inference" (a batch, and a single image) or "training": forward, cross-entropy, backward, AdamW.
        device: PyTorch's name of the device.
        dtype: of weights and images in inference; of autocast in training, with float32 weights.
        batch: images.
        size: height and width in pixels; default the network's own.
        compiled: use `torch.compile`.
        fused: call `model.fuse()`; timm's networks are reparametrized if timm can do it.
        channels_last: memory layout of weights and images.

    Raises:
        UserError: unknown name, or the network cannot be created with these arguments.
    """

    def __init__(
        self,
        name: str,
        way: str,
        device: str = "cpu",
        dtype: str = "float32",
        batch: int = 8,
        size: Sequence[int] | None = None,
        compiled: bool = False,
        fused: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.device, self.dtype, self.way = torch.device(device), getattr(torch, dtype), way
        self.memory = measuring.Memory(self.device)
        torch.manual_seed(0)
        model: Any = make(name, size)
        own = model.pretrained_cfg["input_size"]
        self.size = (own[0], *(size or own[1:]))
        self.facts = facts(name, model, self.size)
        if fused:
            model = fuse(model, self.size)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        training = way == "training"
        model = model.to(self.device, torch.float32 if training else self.dtype, memory_format=self.layout)
        self.model = model.train(training)
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-5) if training else None
        self.call = torch.compile(model, dynamic=False) if compiled else model
        self.steps = {way: self._images(batch)} | ({} if training else {"latency": self._images(1)})
        self.labels = torch.randint(0, model.num_classes or model.num_features, (batch,), device=self.device)

    def prepare(self) -> Row:
        """Run once, which also compiles, and once more to measure the peak memory.

        Returns:
            `peak_mib`, and the network's `params`, `macs`, `top1` and `shape`.
        """
        self._step(self.way)
        self.memory.restart()
        self._step(self.way)
        found = dict(peak_mib=self.memory.peak())
        for way in self.steps:
            self._step(way)
        self._rest()
        return found | self.facts

    def turn(self, way: str) -> tuple[float, float]:
        """Wall-clock and CPU seconds for one call."""
        found = measuring.turn(lambda: self._step(way), self.device)
        self._rest()
        return found

    def _images(self, count: int) -> Tensor:
        dtype = torch.float32 if self.way == "training" else self.dtype
        images = torch.randn(count, *self.size, device=self.device)
        return images.to(dtype, memory_format=self.layout)

    def _step(self, way: str) -> None:
        images = self.steps[way]
        if self.optimizer is None:
            with torch.inference_mode():
                self.call(images)
            return
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if low else contextlib.nullcontext():
            out: Any = self.call(images)
            if isinstance(out, list | tuple):  # networks with several heads return several outputs
                out = out[0]
            loss = F.cross_entropy(out.float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _rest(self) -> None:
        """Return a GPU's free memory to the other processes."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def make(name: str, size: Sequence[int] | None = None) -> nn.Module:
    """Create the network. timm's networks that are built for one size get this one; ours take any.

    Raises:
        UserError: unknown name, or the network cannot be created with these arguments.
    """
    arguments: dict[str, Any] = {}
    if size is not None and name.partition(".")[0] not in names.our_models() and _is_told_the_size(name):
        arguments["img_size"] = tuple(size)
    return networks.create("model", name, arguments)


def _is_told_the_size(name: str) -> bool:
    networks.check_name(name)
    try:
        with torch.device("meta"):
            network = timm.create_model(name)
    except (RuntimeError, NotImplementedError):  # it reads values of tensors
        network = timm.create_model(name)
    return "img_size" in inspect.signature(type(network).__init__).parameters


def fuse(model: nn.Module, size: Sequence[int]) -> nn.Module:
    """Prepare for inference: our networks with `fuse()`; timm's networks merge their branches, if they have any."""
    fused = getattr(model, "fuse", None)
    if fused is None:
        return reparameterize_model(model.eval())
    return fused(tuple(size[1:]))


def facts(name: str, model: nn.Module, size: Sequence[int]) -> Row:
    """Parameters, multiply-accumulates for an image of `size` (C, H, W), published top-1 in percent (ours only).

    At the size of the network's card, the multiply-accumulates are the card's, as in `hybridzoo info`.
    """
    found: Row = dict(shape=dict(height=size[1], width=size[2]))
    found["params"] = sum(parameter.numel() for parameter in model.parameters())
    arch, _, tag = name.partition(".")
    card = next((card for card in cards(arch) if card.model == arch and tag in ("", card.tag)), None)
    if card is not None and tuple(size) == card.input_size:
        found["macs"] = round(card.gmacs * 1e9)
    else:
        found["macs"] = model_info.count_macs(model, size)
    return found | (dict(top1=card.top1) if card is not None and card.top1 is not None else {})
