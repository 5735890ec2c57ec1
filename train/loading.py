"""OpenMMLab's loading of pictures, with our reader.

Importing this file replaces mmcv's class of the same name. So all configs use our reader here, and the config in a
run's folder also works with mmdet's and mmseg's own tools.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import mmcv.transforms
import numpy as np
from mmengine import fileio
from mmengine.registry import TRANSFORMS

from hybridzoo.train.errors import UserError
from hybridzoo.train.images import read_image


@TRANSFORMS.register_module(force=True)
class LoadImageFromFile(mmcv.transforms.LoadImageFromFile):
    """`results["img_path"]` -> `results["img"]`: (H, W, 3) uint8, BGR, upright, see `hybridzoo.train.images`.

    Args:
        white_value: see `hybridzoo.train.images`.
        **options: mmcv's. For other modes ("unchanged", "grayscale"), mmcv reads the picture.

    Raises:
        UserError: the picture cannot be read, or has another size than in its annotations.
    """

    def __init__(self, *args: Any, white_value: float | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.white_value = white_value

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        if not self.color_type.startswith("color") or self.ignore_empty or self.file_client_args:
            return super().transform(results)
        name = str(results["img_path"])
        source: Any = Path(name)
        if self.backend_args:
            source = io.BytesIO(fileio.get(name, backend_args=self.backend_args))
        image = np.asarray(read_image(source, name=name, white_value=self.white_value))
        width, height = results.get("width"), results.get("height")
        if width and height and "instances" in results and image.shape[:2] != (height, width):  # see `images.looked_at`
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise UserError(f"image {name} is {size}, its annotation says {width:g}x{height:g}; correct it")
        image = np.ascontiguousarray(image if self.color_type == "color_rgb" else image[:, :, ::-1])
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results
