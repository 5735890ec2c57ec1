"""FasterViT's published names: of the fixed-size and the any-resolution models."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import HEAD, Table, to_ours, to_published

# Constants, caches of the last training step, and a second name of the carrier tokens' convolution.
_DROPPED = re.compile(
    r"\.(relative_bias|relative_coords_table|relative_position_index)$|\.global_tokenizer\.pos_embed\."
)
_TOKENIZER = ".global_tokenizer.to_global_feature.pos."
_TABLE: Table = [
    ("patch_embed.conv_down.0.", "stem.conv1.conv."),
    ("patch_embed.conv_down.1.", "stem.conv1.norm."),
    ("patch_embed.conv_down.3.", "stem.conv2.conv."),
    ("patch_embed.conv_down.4.", "stem.conv2.norm."),
    # The downsampling ends a published stage; in our network it belongs to the next stage.
    *[(f"levels.{i}.downsample.reduction.0.", f"stages.{i + 1}.downsample.conv.") for i in range(3)],
    *[(f"levels.{i}.downsample.norm.", f"stages.{i + 1}.downsample.norm.") for i in range(3)],
    *[
        (f"levels.{i}.blocks.*.{layer}*.", f"stages.{i}.blocks.*.conv*.{layer}.")
        for i in (0, 1)
        for layer in ("conv", "norm")
    ],
    *[(f"levels.{i}.blocks.", f"stages.{i}.blocks.") for i in (2, 3)],
    (f"levels.*{_TOKENIZER}", "stages.*.carrier_tokens.conv."),
    *[(f".gamma{i}", f".carriers.scale{i}.gamma") for i in (1, 2)],
    *[(f".gamma{i + 2}", f".tokens.scale{i}.gamma") for i in (1, 2)],
    *[
        (f".{published}.cpb_mlp.{2 * i - 2}.", f".{ours}.mlp.fc{i}.")
        for published, ours in (
            ("hat_pos_embed", "carrier_pos_embed"),
            ("pos_embed", "pos_embed"),
            ("pos_emb_funct", "bias"),
        )
        for i in (1, 2)
    ],
    (".hat_norm*.", ".carriers.norm*."),
    (".hat_attn.", ".carriers.attn."),
    (".hat_mlp.", ".carriers.mlp."),
    *[
        (f"stages.{i}.blocks.*.{layer}.", f"stages.{i}.blocks.*.tokens.{layer}.")
        for i in (2, 3)
        for layer in ("norm*", "attn", "mlp")
    ],
    *HEAD,
]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    stripped = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    return {to_ours(key, _TABLE): tensor for key, tensor in stripped.items() if not _DROPPED.search(key)}


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    published = {to_published(key, _TABLE): tensor for key, tensor in state_dict.items()}
    # The authors' module has this convolution under two names.
    second = {name: tensor for name, tensor in published.items() if _TOKENIZER in name}
    return published | {
        name.replace(_TOKENIZER, ".global_tokenizer.pos_embed."): tensor.clone() for name, tensor in second.items()
    }
