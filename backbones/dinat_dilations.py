"""Dilations of DiNAT's blocks: by image size, or as in the authors' configurations for a task.

Dilations depend on variant, task and resolution, not on the weights: any weights run with any dilations, but they give
the published accuracy only with the dilations of their training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from hybridzoo.layers.neighborhood import fitting_dilation

Skeleton = Literal["conv", "swin", "isotropic"]
Dilations = Sequence[Sequence[int]]  # a stage's dilations, repeated over its blocks

STRIDES = (4, 8, 16, 32)

_IN1K_224 = ((1, 8), (1, 4), (1, 2), (1,))
_IN1K_384 = ((1, 13), (1, 6), (1, 3), (1,))
_COCO_3 = (1, 3, 1, 5, 1, 7)
_ADE20K_512_3 = (1, 2, 1, 3, 1, 4)
_ADE20K_640_3 = (1, 2, 1, 3, 1, 4, 1, 5) * 2 + (1, 5)

DILATIONS: dict[str, dict[Skeleton, Dilations]] = {
    "in1k_224": {"conv": _IN1K_224, "swin": _IN1K_224},
    "in1k_384": {"conv": _IN1K_384, "swin": _IN1K_384},
    "coco": {
        "conv": ((1, 28), (1, 7, 1, 14), _COCO_3, (1, 3)),
        "swin": ((1, 28), (1, 14), _COCO_3, (1, 3)),
    },
    "ade20k_512": {
        "conv": ((1, 16), (1, 4, 1, 8), _ADE20K_512_3, (1, 2)),
        "swin": ((1, 16), (1, 8), _ADE20K_512_3, (1, 2)),
    },
    "ade20k_640": {
        "conv": ((1, 20), (1, 5, 1, 10), _ADE20K_640_3, (1, 2)),
        "swin": ((1, 20), (1, 10), _ADE20K_640_3, (1, 2)),
    },
    "mask2former": {"conv": ((1, 14), (1, 4, 1, 7), (1, 2, 1, 3) * 4 + (1, 3), (1,))},  # with an 11 x 11 kernel
}


def dilations_for(image_size: int | tuple[int, int], kernel_size: int = 7) -> Dilations:
    """Dilations for images of this size (pixels, one number or (height, width)), as the authors chose for ImageNet.

    Every second block of a stage has the largest dilation whose window fits into the stage's map.

    Example:
        >>> dilations_for(384)
        ((1, 13), (1, 6), (1, 3), (1, 1))
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return tuple((1, fitting_dilation(-(-height // s), -(-width // s), kernel_size)) for s in STRIDES)


def block_dilations(
    dilations: Dilations | str, depths: Sequence[int], skeleton: Skeleton
) -> list[list[int | Literal["auto"]]]:
    """The dilation of every block, stage by stage.

    Args:
        dilations: one sequence a stage, repeated over its blocks; a key of `DILATIONS`; or `"auto"`, which alternates 1
            and, left for the block to find at its map's size, the largest that fits.
        depths: blocks in each stage.
        skeleton: of the network; published choices differ between skeletons.

    Raises:
        ValueError: an unknown name, or sequences that do not fit.
    """
    if dilations == "auto":
        # Odd-numbered blocks are dilated, counted within a stage; isotropic stages have one block each.
        first = [i if skeleton == "isotropic" else 0 for i in range(len(depths))]
        return [["auto" if (start + j) % 2 else 1 for j in range(n)] for start, n in zip(first, depths, strict=True)]
    pattern: Any = dilations
    if isinstance(dilations, str):
        published = {name: choice[skeleton] for name, choice in DILATIONS.items() if skeleton in choice}
        if dilations not in published:
            raise ValueError(
                f"dilations of this net are sequences of numbers or one of {', '.join(['auto', *published])};"
                f" got {dilations!r}"
            )
        pattern = published[dilations]
    if len(pattern) != len(depths) or not all(p and all(isinstance(d, int) and d > 0 for d in p) for p in pattern):
        raise ValueError(
            f"dilations must be {len(depths)} sequences of positive numbers, one for each stage; got {dilations!r}"
        )
    return [[p[j % len(p)] for j in range(depth)] for p, depth in zip(pattern, depths, strict=True)]
