"""The MLP of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from hybridzoo.layers.conv_norm_act import ActLayer
from hybridzoo.layers.gelu import GELU
from hybridzoo.layers.linear import Linear, linear_act
from hybridzoo.layers.slicing import by_images


class Mlp(nn.Module):
    """Linear layer, activation, linear layer, on `(..., dim)`, with the names of timm's `Mlp`.

    Evaluation on a CPU takes a few tokens at a time: the hidden tokens of a whole batch fit into no cache, and fresh
    memory for them costs as much as the products.

    Args:
        dim: channels.
        hidden_dim: channels between the two linear layers.
        act_layer: makes the activation, the exact GELU by default.
    """

    def __init__(self, dim: int, hidden_dim: int, act_layer: ActLayer = GELU) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = act_layer()
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        return by_images(self._of_tokens, tokens, self.fc1.out_features, self.training).view(x.shape)

    def _of_tokens(self, x: Tensor) -> Tensor:
        return self.fc2(linear_act(self.fc1, x, self.act))
