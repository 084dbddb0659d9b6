"""Queries, keys, values and mixed values of PyTorch's fused attention, as modules to hook."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

PARTS = ("q", "k", "v", "z")


class OpenAttention(nn.MultiheadAttention):
    """Self-attention over [n, tokens, d] whose `q`, `k`, `v` and `z` are modules that do nothing.

    As long as none of them has a hook, the fused call of the library runs and gives its numbers.
    With one, the same formula runs in its steps, so that the hook sees, and may change, the
    projections of all heads side by side [n, tokens, heads · width] (`q` not yet scaled, no
    rotation) or the heads' weighted values before the output projection (`z`). The parts have no
    weights: the state dict stays that of the library.
    """

    @staticmethod
    def open(attention: nn.MultiheadAttention) -> None:
        """Give a self-attention, batch first, its four parts."""
        attention.__class__ = OpenAttention
        for part in PARTS:
            attention.add_module(part, nn.Identity())

    def forward(self, query: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        """See `nn.MultiheadAttention.forward`; keys and values are those of `query`."""
        parts = [self.get_submodule(part) for part in PARTS]
        if not any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            result: tuple[Tensor, Any] = super().forward(query, *arguments, **options)
            return result
        projected = functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (
            part(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part, x in zip(parts, projected, strict=False)
        )
        z = functional.scaled_dot_product_attention(q, k, v, attn_mask=options.get("attn_mask"))
        return self.out_proj(parts[3](z.transpose(1, 2).flatten(2))), None
