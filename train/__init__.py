"""Training: one engine for three tasks, and what a config of mmengine, mmdet or mmseg needs to use this package.

Importing it (`custom_imports = dict(imports=["hybridzoo.train"])` in a config) registers our backbone, necks, hooks and
optimizers, puts torchvision's operators in the place of mmcv's compiled ones where those are missing, and lets
`_base_ = "hybridzoo::mask-rcnn"` name our recipes. A process of our command line does all that when a verb needs it.
"""

import hybridzoo

if not hybridzoo.IS_OUR_COMMAND:
    try:
        from hybridzoo.train import registration  # noqa: F401
    except ModuleNotFoundError as missing:  # without the [train] extra, the modules that do without it work
        if (missing.name or "").partition(".")[0] not in ("mmengine", "rich", "wandb"):
            raise
