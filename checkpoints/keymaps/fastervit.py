"""FasterViT's published names, of the fixed-size and the any-resolution models."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.rules import rename

# Constants, caches of whatever training step came last, and a second name of the carrier tokens' convolution.
_DROPPED = re.compile(
    r"\.(relative_bias|relative_coords_table|relative_position_index)$|\.global_tokenizer\.pos_embed\."
)
_RULES = [
    (r"^patch_embed\.conv_down\.0\.", "stem.conv1.conv."),
    (r"^patch_embed\.conv_down\.1\.", "stem.conv1.norm."),
    (r"^patch_embed\.conv_down\.3\.", "stem.conv2.conv."),
    (r"^patch_embed\.conv_down\.4\.", "stem.conv2.norm."),
    # A stage's downsampling leads to the next one; here it belongs to that.
    *[(rf"^levels\.{i}\.downsample\.reduction\.0\.", f"stages.{i + 1}.downsample.conv.") for i in range(3)],
    *[(rf"^levels\.{i}\.downsample\.norm\.", f"stages.{i + 1}.downsample.norm.") for i in range(3)],
    (r"^levels\.([01])\.blocks\.(\d+)\.(conv|norm)([12])\.", r"stages.\1.blocks.\2.conv\4.\3."),
    (r"^levels\.", "stages."),
    (r"\.global_tokenizer\.to_global_feature\.pos\.", ".carrier_tokens.conv."),
    (r"\.gamma([12])$", r".carriers.scale\1.gamma"),
    (r"\.gamma3$", ".tokens.scale1.gamma"),
    (r"\.gamma4$", ".tokens.scale2.gamma"),
    (r"\.hat_pos_embed\.", ".carrier_pos_embed."),
    (r"\.hat_(norm|attn|mlp)", r".carriers.\1"),
    (r"^(stages\.[23]\.blocks\.\d+)\.(norm|attn|mlp)", r"\1.tokens.\2"),
    (r"\.pos_emb_funct\.", ".bias."),
    (r"\.cpb_mlp\.0\.", ".mlp.fc1."),
    (r"\.cpb_mlp\.2\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    stripped = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    return {rename(key, _RULES): tensor for key, tensor in stripped.items() if not _DROPPED.search(key)}
