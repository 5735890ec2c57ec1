"""Training: one engine for three tasks, and the registrations that configs of mmengine, mmdet and mmseg need.

Importing it (`custom_imports = dict(imports=["hybridzoo.train"])` in a config) registers our backbone, necks, hooks and
optimizers, replaces mmcv's compiled operators by torchvision's if they are missing, and lets `_base_ =
"hybridzoo::mask-rcnn"` name our recipes. Our command line does all this only when a verb needs it.
"""

import hybridzoo

if not hybridzoo.IS_OUR_COMMAND:
    try:
        from hybridzoo.train import registration  # noqa: F401
    except ModuleNotFoundError as missing:  # modules that do not need the [train] extra work without it
        if (missing.name or "").partition(".")[0] not in ("mmengine", "rich", "wandb"):
            raise
