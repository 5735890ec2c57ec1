"""Any timm model as the backbone of an mmdet detector or mmseg segmentor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hybridzoo.train import networks
from hybridzoo.train.errors import UserError
from hybridzoo.train.weights import fitting_out_norms, load_matching, read_parts, tell

OutNorm = Literal["LN", "BN"] | None


class Level(NamedTuple):
    """One map of a pyramid: level `index` of the model, its stride doubled `doublings` times (halved, if negative)."""

    index: int  # type: ignore[assignment]  # and not the tuple's method
    stride: int
    width: int
    doublings: int = 0


def pyramid(feature_info: Sequence[Mapping[str, Any]], strides: Sequence[int]) -> list[Level]:
    """One level for each stride: the model's last one of that stride, or one made from the nearest level.

    Args:
        feature_info: the model's, a mapping with `num_chs` and `reduction` per level.
        strides: each a power of two times a stride of the model.

    Raises:
        UserError: a stride that cannot be made from any level.
    """
    levels = []
    for stride in strides:
        steps = [round(math.log2(stride / level["reduction"])) for level in feature_info]
        nearest = min(range(len(steps)), key=lambda i: (abs(steps[i]), -i))
        level, doublings = feature_info[nearest], steps[nearest]
        if level["reduction"] * 2.0**doublings != stride:
            raise UserError(
                f"backbone strides={tuple(strides)}: {stride} is not a power of two times {level['reduction']}"
            )
        width = level["num_chs"] if doublings >= 0 else max(1, level["num_chs"] >> -doublings)
        levels.append(Level(nearest, stride, width, doublings))
    return levels


def _rescale(width: int, doublings: int) -> nn.Module:
    """Halve or double the stride of a map (B, width, H, W) `doublings` times."""
    if doublings >= 0:
        return nn.Sequential(*(nn.MaxPool2d(2, ceil_mode=True) for _ in range(doublings)))
    steps: list[nn.Module] = []
    for _ in range(-doublings):
        if steps:
            steps += [LayerNorm2d(width), nn.GELU()]
        steps.append(nn.ConvTranspose2d(width, max(1, width // 2), kernel_size=2, stride=2))
        width = max(1, width // 2)
    return nn.Sequential(*steps)


def freeze(model: Any, stages: int, groups: Mapping[str, int] | None = None) -> list[nn.Module]:
    """Freeze a timm model's stem (0), or its stem and first k stages (k); -1 freezes nothing.

    Args:
        groups: parameter name -> stage, default the model's `group_matcher(coarse=True)`.

    Returns:
        The modules whose parameters are all frozen; the caller keeps them in evaluation mode.

    Raises:
        UserError: the model does not define its stages, or `stages` leaves nothing to train.
    """
    if stages < 0 and groups is None:
        return []
    if groups is None:
        if not hasattr(model, "group_matcher"):
            raise UserError(f"freeze {stages}: {type(model).__name__} does not define its stages")
        groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    most = max(groups.values())
    if stages > most:
        raise UserError(f"freeze {stages}: the model has the stages 0 to {most}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and groups[name] > stages)
    return [
        module
        for module in model.modules()
        if (own := list(module.parameters())) and not any(parameter.requires_grad for parameter in own)
    ]


@MODELS.register_module()
class PyramidBackbone(nn.Module):
    """Feature maps of a timm model: image (B, 3, H, W) -> tuple of maps (B, channels[i], H / s_i, W / s_i).

    Parameters keep timm's names below `model.`, so classification weights load without changes. Maps are always NCHW,
    whatever the model uses inside. The model decides which image sizes it takes (ours: all from 32 px) and how the
    sizes of the maps are rounded.

    Args:
        name: a model registered with timm, ours or timm's own.
        out_indices: which levels to return, as timm counts them (`feature_info`): four-stage nets usually have levels
            0-3 at strides 4-32, ResNets a level 0 at stride 2 before those. Default 0-3.
        out_norm: a new norm for each returned level, not applied inside the trunk: "LN" over channels,
            "BN" BatchNorm, or None; one for all levels, or a sequence with one for each (LITv2's published detectors
            leave the finest map as it is).
        out_norm_eps: epsilon of "LN"; default that of the model's first LayerNorm, as in the published detectors (DiNAT
            and the Swin hosts 1e-5, BiFormer 1e-6), or 1e-6 if it has none.
        frozen_stages: the stem (0), or the stem and the first k stages (k), get no gradient and keep their statistics;
            -1 freezes nothing. Stages are those of the model's `group_matcher(coarse=True)`.
        norm_eval: keep BatchNorms at their running statistics while training; their weights still learn.
        strides: instead of `out_indices`, the strides to return, e.g. (4, 8, 16, 32). If the model has no level for a
            stride, it is made from the nearest level, as ViTDet does (Li et al., arXiv 2203.16527, section 3): halved
            by 2 x 2 transposed convolutions that also halve the width, doubled by 2 x 2 max-pooling.
        with_cp: recompute activations in the backward pass to save memory, if the model supports it.
        weights: checkpoint to start training from (safetensors or .pth). From a classifier, everything but the head is
            used; from a detector or segmentor, published or ours, the backbone and the output norms. Read by
            `init_weights`, so testing and resuming do not need the file. `pretrained=True` uses timm's instead.
        **model_args: passed to `timm.create_model`.

    Attributes:
        channels: width of each returned level.
        strides: reduction of each returned level.

    Raises:
        UserError: unknown model, a level the model does not have, or weights of another model.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        out_norm: OutNorm | Sequence[OutNorm] = None,
        out_norm_eps: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        weights: str | Path | None = None,
        strides: Sequence[int] | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__()
        self.name = name
        self.model_args = model_args
        self.weights = weights
        self.norm_eval = norm_eval
        self.model = self._create()
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"backbone name={name!r}: this timm model cannot return intermediate maps")
        info = list(self.model.feature_info)
        if strides is not None and out_indices is not None:
            raise UserError("backbone: give strides or out_indices, not both")
        if strides is None:
            out_indices = (0, 1, 2, 3) if out_indices is None else out_indices
            if bad := [i for i in out_indices if not 0 <= i < len(info)]:
                raise UserError(
                    f"backbone out_indices={tuple(out_indices)}: {name} has levels 0 to {len(info) - 1}, not {bad[0]}"
                )
            levels = [Level(index, info[index]["reduction"], info[index]["num_chs"]) for index in out_indices]
        else:
            levels = pyramid(info, strides)
        self.out_indices = tuple(sorted({level.index for level in levels}))
        self.sources = [self.out_indices.index(level.index) for level in levels]
        self.channels = [level.width for level in levels]
        self.strides = [level.stride for level in levels]
        self._groups = {coarse: self._group(coarse) for coarse in (False, True)}
        # The head and the final norm get no gradient here, and DDP raises an error for parameters without one.
        self.model.prune_intermediate_layers(list(self.out_indices), prune_norm=True, prune_head=True)
        if with_cp:
            self.model.set_grad_checkpointing(True)
        eps = self._eps() if out_norm_eps is None else out_norm_eps
        norm: dict[str | None, Any] = {None: nn.Identity, "LN": partial(LayerNorm2d, eps=eps), "BN": nn.BatchNorm2d}
        kinds = [out_norm] * len(levels) if out_norm is None or isinstance(out_norm, str) else list(out_norm)
        if len(kinds) != len(levels) or any(kind not in norm for kind in kinds):
            raise UserError(
                f"backbone out_norm={out_norm!r}: choose 'LN', 'BN' or None, or a list with one for each of the "
                f"{len(levels)} levels"
            )
        if any(level.doublings for level in levels):
            scales = [_rescale(info[level.index]["num_chs"], level.doublings) for level in levels]
            self.rescale: nn.ModuleList | None = nn.ModuleList(scales)
        else:  # all levels exist in the model: nothing to learn, and no names in the state dict
            self.rescale = None
        self.out_norms = nn.ModuleList(norm[kind](width) for kind, width in zip(kinds, self.channels, strict=True))
        self._freeze(frozen_stages)

    def _create(self) -> Any:  # Any: nn.Module does not declare what every timm model has
        return networks.create("model.backbone", self.name, self.model_args)

    def _eps(self) -> float:
        return next((module.eps for module in self.model.modules() if isinstance(module, nn.LayerNorm)), 1e-6)

    def _group(self, coarse: bool) -> dict[str, int]:
        """Parameter name of the full timm model -> the number of its stage (coarse) or layer, counted from the stem."""
        return group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)

    def _freeze(self, stages: int) -> None:
        self.frozen = freeze(self.model, stages, self._groups[True])

    def init_weights(self) -> None:
        """Load `weights`, if given. mmengine calls this once before training, not before testing or resuming."""
        if self.weights is not None:
            self.load(self.weights)

    def load(self, path: str | Path) -> None:
        """Load the whole backbone from a file, and its output norms if they fit; print what was loaded.

        Raises:
            UserError: the file cannot be read, or its backbone is another model's; nothing changes.
        """
        parts = read_parts(path, self.model)
        # A classifier has a head and a final norm, and stages beyond the last level, that this backbone lacks.
        lacking = self._create().state_dict().keys() - self.model.state_dict().keys()
        state = {name: value for name, value in parts.network.items() if name not in lacking}
        report = f"backbone: {load_matching(self.model, state, allow_head_mismatch=True, source=path)}"
        norms = fitting_out_norms(self.out_norms, parts.out_norms)
        self.out_norms.load_state_dict(norms, strict=False)
        if norms:
            report += f"; output norms: {len(norms)} tensors"
        beyond = sorted({name.partition(".")[0] for name in parts.network if name in lacking})
        unused = [*parts.outside, *(f"backbone's {part}" for part in beyond)]
        if parts.out_norms and not norms:
            unused.append("output norms")
        if unused:
            report += f"; left out: {', '.join(unused)}"
        tell(f"weights {path}: {report}")

    def train(self, mode: bool = True) -> PyramidBackbone:
        super().train(mode)
        if mode:
            for module in self.frozen:
                module.eval()
            if self.norm_eval:
                for module in self.model.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.forward_intermediates(
            x, indices=list(self.out_indices), output_fmt="NCHW", intermediates_only=True
        )
        maps = [maps[source] for source in self.sources]
        if self.rescale is not None:
            maps = [rescale(level) for rescale, level in zip(self.rescale, maps, strict=True)]
        return tuple(norm(level) for norm, level in zip(self.out_norms, maps, strict=True))

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Parameter name -> layer number, for timm's layer decay; the output norms belong to the last layer."""
        groups, last = self._groups[coarse], max(self._groups[coarse].values())
        return lambda name: groups.get(name.removeprefix("model."), last)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the model excludes from weight decay."""
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", tuple)()}
