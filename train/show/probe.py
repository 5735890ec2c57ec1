"""Measures the weights of a query's keys: the derivative of the result of an attention with respect to its values.

The result of an attention is linear in the values, `result[q] = sum over k of weight[k] * value[k]`. So the derivative
of one channel of it with respect to that channel of every value is exactly the weights, for every kind of attention:
one softmax in windows, two through agents, a routing, or a product without weights in memory. This file knows about
the layers only what `attentions` lists: which module computes the values, and which module reads the results.

The network runs once without changes, and the inputs of its attentions are recorded. Then the attentions run alone, and
the outputs of some of their modules become leaves of the graph, so that autograd can differentiate with respect to
them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybridzoo.layers import BiLevelRoutingAttention, DeformableAttention
from hybridzoo.layers.windows import from_windows, to_windows
from hybridzoo.train.show.attentions import Head, Layer

Call = tuple[tuple[Any, ...], dict[str, Any]]
Array = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one query sees in one layer. All weights are given for each head, `(heads, ...)`.

    Attributes:
        layer: the attention.
        query: row and column of the query's token on the map.
        cell: side of a token in pixels of the image that the network saw.
        weights: `(heads, rows, columns)`, the weights of the map's tokens; exactly 0 for tokens that are not seen.
        extra: `(heads, tokens)`, the weights of a class token, or of the carrier tokens of the query's window.
        beyond: `(heads,)`, the weight of the padding around the map.
        places: `(heads, points, 3)`, for deformable attention: row and column on the map (0 is the middle of the first
            token) and weight of every sampled point.
        region: height and width, in tokens, of the regions that routing chooses from.
    """

    layer: Layer
    query: tuple[int, int]
    cell: float
    weights: Array
    extra: Array
    beyond: Array
    places: Array | None = None
    region: tuple[int, int] | None = None


def look(model: nn.Module, image: Tensor, layers: Sequence[Layer], point: tuple[float, float]) -> list[Seen]:
    """What the token at one point of an image sees in several layers of a network.

    Args:
        model: in evaluation mode, not fused.
        image: `(1, channels, height, width)`, the network's input.
        layers: from `find_layers`.
        point: position of the query, x and y, as fractions of the image's width and height in 0..1.
    """
    calls = _note(model, image, layers)
    return [_look(model, image, layer, calls[layer.frame], point) for layer in layers]


def _note(model: Any, image: Tensor, layers: Sequence[Layer]) -> dict[nn.Module, Call]:
    """The arguments of the layers' frames when the network processes an image."""
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = args, kwargs

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for frame in {layer.frame for layer in layers}:
            hooks.callback(frame.register_forward_pre_hook(note, with_kwargs=True).remove)
        model.forward_features(image)
    return calls


def _look(model: nn.Module, image: Tensor, layer: Layer, call: Call, point: tuple[float, float]) -> Seen:
    run = _Run(layer, call)
    cell = _stride(model, layer) * layer.coarse
    size = _map_size(layer, run.entry, call, image, cell)
    across, down = (
        min(int(share * side / cell), count - 1)
        for share, side, count in zip(point, (image.shape[3], image.shape[2]), size[::-1], strict=True)
    )
    frame = _Frame(layer, run.entry, size)
    result = run.result_of(frame.token(run.exit, down, across))
    weights, extra, beyond, points = [], [], [], []
    for head in layer.heads:
        of_values, source, padding = run.weights(result[head.result], head)
        on_map, of_extra = frame.spread(of_values, source, head, (down, across))
        weights.append(on_map)
        extra.append(of_extra)
        beyond.append(of_values.sum() + padding - on_map.sum() - of_extra.sum())
        points.append(of_values.flatten())
    module = layer.module
    return Seen(
        layer=layer,
        query=(down, across),
        cell=cell,
        weights=_array(weights),
        extra=_array(extra),
        beyond=_array(beyond),
        places=_places(module, run.entry, points, size) if isinstance(module, DeformableAttention) else None,
        region=module.region_grid(*size)[1] if isinstance(module, BiLevelRoutingAttention) else None,
    )


class _Run:
    """A layer's frame, run again so that its results can be differentiated with respect to its values.

    Attributes:
        entry: the map (or tokens) that the attention reads.
        exit: the map after the attention, with or without the residual connection.
    """

    def __init__(self, layer: Layer, call: Call) -> None:
        self.layer = layer
        self._made: dict[str, list[tuple[Tensor, Tensor]]] = {}  # per module: input, leaf for its output
        self._noted: dict[str, Tensor] = {}
        args, kwargs = list(call[0]), call[1]
        entry = args[layer.argument].detach().requires_grad_()
        args[layer.argument] = entry
        with torch.enable_grad(), contextlib.ExitStack() as hooks:
            self._hook(hooks)
            output = layer.frame(*args, **kwargs)
        self.entry: Tensor = self._noted.get("entry", entry)
        self.exit: Tensor = self._noted.get("exit", output)
        self._made[""] = [(self.entry, self.entry)]

    def result_of(self, updated: Tensor) -> Tensor:
        """The input of the layer's `result` module for the one token `updated`: `(channels,)`."""
        axis = self.layer.axis
        (gradient,) = torch.autograd.grad(updated.sum(), self._noted["out"], retain_graph=True)
        reached = gradient.movedim(axis, -1).abs().sum(-1)
        index = np.unravel_index(int(reached.argmax()), reached.shape)
        return self._noted["result"].movedim(axis, -1)[index]

    def weights(self, result: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        """For one channel of a result: the weights of all values, the input of the values, and the weight of padding.

        A layer that pads after its projection calls the projection a second time, for the value of the padding.
        """
        made = self._made[head.values]
        gradients = torch.autograd.grad(result, [leaf for _, leaf in made], retain_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(leaf if gradient is None else gradient) if gradient is None else gradient
            for gradient, (_, leaf) in zip(gradients, made, strict=True)
        ]
        of_head = [part.detach().movedim(self.layer.axis, -1)[..., head.value] for part in parts]
        main = max(range(len(made)), key=lambda i: of_head[i].numel())
        padding = sum((part.sum() for i, part in enumerate(of_head) if i != main), of_head[main].new_zeros(()))
        return of_head[main], made[main][0], padding

    def _hook(self, hooks: contextlib.ExitStack) -> None:
        layer = self.layer

        def after(name: str, hook: Any, of: nn.Module = layer.module) -> None:
            hooks.callback(of.get_submodule(name).register_forward_hook(hook).remove)

        def before(name: str, hook: Any, of: nn.Module = layer.module) -> None:
            hooks.callback(of.get_submodule(name).register_forward_pre_hook(hook).remove)

        def values(name: str) -> Any:
            def cut(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                leaf = output.detach().clone()
                if layer.ones is not None:
                    leaf[..., slice(*layer.ones)] = 1
                self._made.setdefault(name, []).append((args[0], leaf.requires_grad_()))
                return leaf

            return cut

        def leaf_of(name: str) -> Any:
            def cut(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return self._noted.setdefault(name, output.detach().requires_grad_())

            return cut

        def note(name: str) -> Any:
            def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                self._noted.setdefault(name, args[0])

            return keep

        for name in dict.fromkeys(head.values for head in layer.heads if head.values):
            after(name, values(name))
        for name in layer.silent:
            after(name, lambda module, args, output: torch.zeros_like(output))
        for name in layer.fixed:
            after(name, lambda module, args, output: output.detach())
        before(layer.result, note("result"))
        after(layer.out, leaf_of("out"))
        if layer.frame is not layer.module:
            after("norm1", leaf_of("entry"), layer.frame)
            before("norm2", note("exit"), layer.frame)


class _Frame:
    """The positions of a map's tokens in the tensors that a layer reads and writes.

    `size` is that of the map, in tokens. A sequence of tokens may start with tokens that are not on the map (a class
    token).
    """

    def __init__(self, layer: Layer, entry: Tensor, size: tuple[int, int]) -> None:
        self.layer, self.entry, self.size = layer, entry, size
        self.first = 0  # number of tokens before those of the map or of the window
        if layer.windows is not None:
            self.first = entry.shape[1] - layer.windows[0] * layer.windows[1]
        elif entry.ndim == 3:
            self.first = entry.shape[1] - size[0] * size[1]

    def token(self, written: Tensor, row: int, column: int) -> Tensor:
        """The channels of a token in the layer's output, which may be a map or a sequence of tokens."""
        if self.layer.windows is not None:
            window, token = self._in_window(row, column)
            return written[window, self.first + token]
        if written.ndim == 3:
            return written[0, self.first + row * self.size[1] + column]
        return written[0, :, row, column] if self.layer.map_axis == 1 else written[0, row, column]

    def spread(self, weights: Tensor, source: Tensor, head: Head, query: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The weights of values on the map, `(rows, columns)`, and those of tokens that are not on the map.

        If values are not in the order of the map, autograd finds how their input `source` depends on the map.
        """
        rows, columns = self.size
        if self.layer.windows is not None:
            window, _ = self._in_window(*query)
            height, width = self.layer.windows
            down, right = -(-rows // height), -(-columns // width)
            tokens = weights[:, self.first :].reshape(1, down, right, height, width, 1)
            return from_windows(tokens, rows, columns)[0, :, :, 0], weights[window, : self.first]
        flat = weights.reshape(-1)
        if not self.layer.moved:
            return flat[self.first :].view(rows, columns), flat[: self.first]
        here, there = (head.result if head.source is None else head.source), head.result
        wanted = torch.zeros_like(source).movedim(self.layer.axis, -1)
        wanted[..., here] = weights
        (gradient,) = torch.autograd.grad(source, self.entry, wanted.movedim(-1, self.layer.axis), retain_graph=True)
        on_map = gradient.movedim(self.layer.map_axis, -1)[0, ..., there]
        return on_map.reshape(rows, columns), flat[:0]

    def _in_window(self, row: int, column: int) -> tuple[int, int]:
        """The number of the window, and the number of the token in it."""
        marked = torch.zeros(1, *self.size, 1)
        marked[0, row, column] = 1
        assert self.layer.windows is not None
        window, token = to_windows(marked, self.layer.windows).flatten(1, 2).flatten(2)[0].nonzero()[0].tolist()
        return window, token


def _stride(model: Any, layer: Layer) -> int:
    """The side of a token of the layer's stage in pixels of the image."""
    stages = [info for info in model.feature_info if f"{layer.name}.".startswith(f"{info['module']}.")]
    return stages[-1]["reduction"]


def _map_size(layer: Layer, entry: Tensor, call: Call, image: Tensor, cell: float) -> tuple[int, int]:
    """The height and width, in tokens, of the map that an attention reads."""
    if entry.ndim == 4:
        rows, columns = entry.shape[2:] if layer.map_axis == 1 else entry.shape[1:3]
        return rows, columns
    given = [value for value in (*call[0], *call[1].values()) if isinstance(value, tuple) and len(value) == 2]
    if given and layer.windows is None:
        return int(given[0][0]), int(given[0][1])
    rows, columns = (-(-side // int(cell)) for side in image.shape[2:])
    return rows, columns


def _places(module: DeformableAttention, entry: Tensor, weights: Sequence[Tensor], size: tuple[int, int]) -> Array:
    """Row, column and weight of every point that a head samples."""
    with torch.no_grad():
        places = module.places(module.query(entry))[0].flatten(1, 2)  # (groups, points, 2), from -1 to 1
    places = (places + 1) / 2 * (torch.tensor(size, dtype=places.dtype) - 1)
    per_group = module.num_heads // module.groups
    return _array([torch.cat((places[i // per_group], w[:, None]), 1) for i, w in enumerate(weights)])


def _array(parts: Sequence[Tensor]) -> Array:
    return torch.stack(list(parts)).detach().cpu().numpy()
