"""EfficientViT (MSRA): the authors' names, their detectors', and timm's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.rules import Rules, rename

_RULES: Rules = [
    # the authors' stem: convolutions and activations in one Sequential
    (r"^patch_embed\.([0246])\.", lambda m: f"stem.conv{int(m[1]) // 2 + 1}."),
    (r"^patch_embed\.", "stem."),
    # the authors' blocks2 and blocks3 begin with the three parts of a downsampling
    (r"^blocks1\.", "stages.0.blocks."),
    (r"^blocks([23])\.0\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.res1."),
    (r"^blocks([23])\.1\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.patchmerge."),
    (r"^blocks([23])\.2\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.res2."),
    (r"^blocks([23])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 3}."),
    # now timm's layout
    (r"\.res([12])\.0\.m\.", lambda m: f".local{int(m[1]) - 1}.branch."),
    (r"\.res([12])\.1\.m\.", lambda m: f".ffn{int(m[1]) - 1}.branch."),
    (r"\.patchmerge\.conv1\.", ".merge.expand."),
    (r"\.patchmerge\.conv2\.", ".merge.depthwise."),
    (r"\.patchmerge\.conv3\.", ".merge.project."),
    (r"\.patchmerge\.", ".merge."),
    (r"\.dw([01])\.m\.", r".local\1.branch."),
    (r"\.ffn([01])\.m\.", r".ffn\1.branch."),
    (r"\.pw([12])\.", r".fc\1."),
    (r"\.mixer\.m\.attn\.", ".attn.branch."),
    (r"\.dws\.", ".depthwise."),
    (r"\.attn\.branch\.proj\.1\.", ".attn.branch.proj."),
    (r"\.attention_biases$", ".bias.table"),
    (r"^head\.bn\.", "head.after."),
    (r"^head\.(?:l|linear)\.", "head.fc."),
    (r"\.c\.", ".conv."),
    (r"\.bn\.", ".norm."),
]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`; of a detector only the backbone is kept."""
    detector = any(key.startswith("backbone.") for key in state_dict)
    converted = {}
    for published, tensor in state_dict.items():
        if published.endswith("attention_bias_idxs") or (detector and not published.startswith("backbone.")):
            continue  # the indices follow from the window
        key = rename(published.removeprefix("backbone."), _RULES)
        # some files hold 1x1 convolutions as matrices
        matrix = tensor.ndim == 2 and key.endswith((".conv.weight", ".se.fc1.weight", ".se.fc2.weight"))
        converted[key] = tensor[:, :, None, None] if matrix else tensor
    return converted
