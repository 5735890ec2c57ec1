"""Base of all backbones: timm's interface for a stem, stages, a final norm and a head.

A family assigns `stem`, `stages`, `norm` and `head`, and sets the layout of its stages. The stem computes the first map
from an image `(batch, channels, height, width)`, and each stage the next one. Returned maps are NCHW.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.checkpoints.keymaps import sizes
from hybridzoo.checkpoints.pretrained import find_weights, in_our_names
from hybridzoo.layers.inference import SWAPPED, FusedError, Fusible
from hybridzoo.layers.memory import channels_last


class Backbone(Fusible):
    """Base of every family; subclasses call `super().__init__()` and assign the attributes below.

    Attributes:
        stem: image -> first map.
        stages: `nn.Sequential` of modules with a `grad_checkpointing` flag, map -> map.
        norm: final norm, NCHW -> NCHW.
        head: timm classifier head with `reset(num_classes, pool_type)` and `forward(x, pre_logits=...)`.
        layout: of the maps between stages; channels-last maps are permuted (not copied) when returned.
        stages_give_maps: whether a stage's result is its map. Otherwise only `forward_intermediates` makes the maps.
        channels_last: whether the stem converts images to channels last in memory. This is fastest for NCHW families
            that are mostly convolutions. All later maps keep this order, also the returned ones.
        feature_info: one dict per stage, see `set_feature_info`.
    """

    layout: Literal["NCHW", "NHWC"] = "NCHW"
    stages_give_maps: bool = True
    channels_last: bool = False
    stem: nn.Module
    stages: nn.Sequential
    norm: nn.Module
    head: Any  # a timm head; nn.Module does not declare its methods
    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    stem_levels: int = 0  # number of `feature_info`'s levels inside the stem
    for_other_sizes: Mapping[str, Any] = {}  # arguments for images of another size than the published one
    image_channels: int = 3  # channels that a fused network reads; `fuse()` takes them from the first convolution
    optional: tuple[str, ...] = ()  # optional parts: published files contain them, a network only on request

    def set_feature_info(self, channels: Sequence[int], reductions: Sequence[int]) -> None:
        """Describe the stages' maps: `channels` and input pixels per map pixel (`reductions`), finest first."""
        self.feature_info = [
            dict(num_chs=c, reduction=r, module=f"stages.{i}")
            for i, (c, r) in enumerate(zip(channels, reductions, strict=True))
        ]

    def set_stem_info(self, channels: Sequence[int], reductions: Sequence[int], modules: Sequence[str]) -> None:
        """Offer maps inside the stem as further levels, finer than the stages'; needs `stem_maps`."""
        finer = [dict(num_chs=c, reduction=r, module=m) for c, r, m in zip(channels, reductions, modules, strict=True)]
        self.feature_info = finer + self.feature_info
        self.stem_levels = len(finer)

    def stem_maps(self, x: Tensor) -> list[Tensor]:
        """Image -> the levels inside the stem as NCHW maps, finest first (none by default), and the stem's output."""
        return [self.stem(x)]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """PyTorch's method, which also accepts names of the authors, of timm, of wrappers and of our training.

        timm's `checkpoint_path` calls it.
        """
        model = (getattr(self, "pretrained_cfg", None) or {}).get("architecture")
        if model and state_dict and not state_dict.keys() <= self.state_dict().keys():
            state_dict = in_our_names(state_dict, model)
        state_dict = self.fit_state(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def fit_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Convert a state dict with our names to this network's form, if its family has several; unchanged by
        default."""
        return state

    def example_image(self, size: int | tuple[int, int] | None) -> Tensor:
        """One black image: of `size` pixels, or of the size that the weights were published for."""
        cfg: dict[str, Any] = self.pretrained_cfg  # type: ignore[assignment]  # timm's builder sets it
        if SWAPPED not in self.forms:  # the first convolution may get another name later
            first: Any = self.get_submodule(cfg["first_conv"])
            self.image_channels = first.weight.shape[1]
        height, width = cfg["input_size"][1:] if size is None else to_2tuple(size)
        like = next(tensor for tensor in self.stem.state_dict().values() if tensor.is_floating_point())
        return torch.zeros(1, self.image_channels, height, width, dtype=like.dtype, device=like.device)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, although they have two or more dimensions."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters from image to logits, for timm's layer-wise decay."""
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; with 0 classes, pooled features are returned, with `global_pool=""` the
        map."""
        if self.fused:
            raise FusedError("reset_classifier()")
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        like = next(self.stem.parameters())
        self.head.to(like.device, like.dtype)  # the head may have no weights

    def forward_features(self, x: Tensor) -> Tensor:
        """Image -> last map after the final norm, NCHW."""
        return self._final(self.stages(self.stem(self._in_order(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map -> logits `(batch, num_classes)`, or pooled features if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of chosen stages, finest first, and the final map.

        Args:
            x: images `(batch, channels, height, width)`.
            indices: levels to return (entries of `feature_info`), the last n if an int, all if `None`.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run stages after the last requested one.
            output_fmt: `"NCHW"`.
            intermediates_only: return only the list of maps.

        Returns:
            List of NCHW maps, or `(final map, list of maps)`.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW'; got {output_fmt!r}")
        levels = self.stem_levels + len(self.stages)
        take, last = feature_take_indices(levels, indices)
        deepest = levels - 1
        x = self._in_order(x)
        *finer, x = self.stem_maps(x) if self.stem_levels else [self.stem(x)]
        intermediates = [feature for i, feature in enumerate(finer) if i in take]
        for i, stage in enumerate(self.stages, start=self.stem_levels):
            if i <= last or not stop_early:
                x = stage(x)
            if i in take:
                intermediates.append(self._offered(x, i, norm=norm and i == deepest))
        if intermediates_only:
            return intermediates
        return (self._to_nchw(x) if stop_early and last < deepest else self._final(x)), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove parts that the chosen intermediates do not need; returns their indices."""
        if self.fused:
            raise FusedError("prune_intermediate_layers()")
        take, last = feature_take_indices(self.stem_levels + len(self.stages), indices)
        self.stages = self.stages[: max(0, last + 1 - self.stem_levels)]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _in_order(self, x: Tensor) -> Tensor:
        return channels_last(x) if self.channels_last else x

    def _to_nchw(self, x: Any, norm: bool = False) -> Tensor:
        """A stage's result as an NCHW map, with the final norm on request."""
        x = x.permute(0, 3, 1, 2) if self.layout == "NHWC" else x
        return self.norm(x) if norm else x

    def _offered(self, x: Any, level: int, norm: bool = False) -> Tensor:
        """What `forward_intermediates` returns for a stage's result; `level` is the index in `feature_info`."""
        return self._to_nchw(x, norm)

    def _final(self, x: Any) -> Tensor:
        """The last stage's result -> the head's input."""
        return self._to_nchw(x, norm=True)


def check_per_stage(stages: int, **arguments: Any) -> None:
    """Raise `ValueError` unless an argument is a sequence with one entry for each stage."""
    for name, value in arguments.items():
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != stages:
            raise ValueError(f"{name} must have one entry for each of {stages} stages; got {value!r}")


def build(family: type[Backbone], variants: dict[str, Any], name: str, pretrained: bool, **kwargs: Any) -> Any:
    """Create the variant `name` with timm's builder, so that pretrained weights and `features_only` work as in timm.

    Weights published for another resolution or kernel have their own tag. The tag's arguments (`Card.model_args`) are
    set first; the caller's arguments override them.

    All families accept timm's `img_size`; families whose weights do not depend on the image size ignore it. timm's
    `checkpoint_path` takes our files and the authors'. timm reads them, prefers moving averages, and refuses files with
    other objects than tensors and options. `pretrained=True, pretrained_cfg_overlay=dict(file=...)` takes those too,
    and uses the entry that the card names.

    Args:
        family: the class, called with a variant's row as first argument.
        variants: the family's table, name -> frozen dataclass.
        name: a key of `variants`.
        pretrained: load the published weights of the model's card through our store, or the weights named by the
            caller's `pretrained_cfg` or `pretrained_cfg_overlay`.
        **kwargs: the class's own arguments; those that name a field of the row override it.

    Raises:
        DownloadError, CheckpointError: the weights cannot be downloaded, or do not fit.
        ValueError: an `output_stride` other than 32: attention over windows and regions has no dilated form. Or a
            `feature_cls` that reads the stages' results, if these are not the maps.
    """
    row = variants[name]
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    kwargs = checkpoints.model_args(name, cfg.tag) | kwargs
    if "img_size" not in {*inspect.signature(family).parameters, *(f.name for f in dataclasses.fields(row))}:
        kwargs.pop("img_size", None)
    if (stride := kwargs.pop("output_stride", 32)) != 32:
        raise ValueError(
            f"output_stride={stride}: {name} has no form with fewer strides; use a decoder that takes strides to 32"
        )
    row = dataclasses.replace(row, **{f.name: kwargs.pop(f.name) for f in dataclasses.fields(row) if f.name in kwargs})
    create: Callable[..., Backbone] = family
    if pretrained and (weights := find_weights(name, cfg, kwargs.get("cache_dir"))):
        create, pretrained = weights.into(family, features_only=kwargs.get("features_only", False)), False
    return build_model_with_cfg(
        create,
        name,
        pretrained,
        model_cfg=row,
        feature_cfg=_feature_cfg(family, name, row, kwargs),
        pretrained_filter_fn=lambda state, model: sizes.fit(in_our_names(state, name), model.state_dict()),
        **kwargs,
    )


def _feature_cfg(family: type[Backbone], name: str, row: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """timm's arguments for `features_only`.

    Maps come from `forward_intermediates`. If the caller asks for another class ("hook", "fx", "list", "dict"), they
    are the stages' results; as in timm, the extractor's `output_fmt` then says whether they are NCHW or NHWC.
    """
    asked = kwargs.get("feature_cls", "getter")
    asked = asked.lower() if isinstance(asked, str) else asked
    if asked in ("getter", FeatureGetterNet):
        return dict(out_indices=None, feature_cls="getter")
    if not family.stages_give_maps or kwargs.get("feature_norms"):
        raise ValueError(
            f"feature_cls={asked!r}: the maps of {name} are not the results of its stages; leave feature_cls out"
        )
    rewritten = asked in ("list", "dict")  # these take the network apart, and find the stages one level down
    return dict(out_indices=tuple(range(len(row.depths))), output_fmt=family.layout, flatten_sequential=rewritten)
