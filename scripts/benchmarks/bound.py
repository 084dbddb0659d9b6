"""The bound of a step: the parts that none can leave out, each alone and at its best.

The encoder's product, once, in bfloat16 where the device multiplies bfloat16 matrices; Adam over
all weights in one pass, gradients included (28 bytes a weight); and four passes over the rows of
chosen latents (scores, decoder and two gradients), in float32. An implementation that keeps rows in
cache from one pass to the next, a gradient in registers, or a product in int8, which PyTorch has
no fast one of on a CPU, may come under a part of it.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sae_runner.kernels.choice import ops_for
from sae_runner.kernels.selection import multiplies_bf16

CHUNKS = (512, 1024, 4096)
"""Rows of the product that are tried at once."""
N_GATHERS = 4


class Bound:
    """Measured as if it were a side of `step`; `parts` has the seconds of each."""

    def __init__(self, options: dict[str, Any], x: Float[Tensor, "n d_in"]) -> None:
        d_in, d_sae = options["d_in"], options["d_sae"]
        self.options, self.parts = options, dict[str, float]()
        half = multiplies_bf16(x.device)
        self.dtype = torch.bfloat16 if half else torch.float32
        self.weights = [
            torch.nn.Parameter(torch.randn(d_sae, d_in, device=x.device)) for _ in range(2)
        ]
        for weight in self.weights:
            weight.grad = torch.randn_like(weight)
        self.adam = torch.optim.Adam(self.weights, lr=1e-6, fused=True)
        self.half = self.weights[0].detach().to(self.dtype)
        n_rows = max(min(rows, len(x)) for rows in CHUNKS)
        self.scores = torch.empty(n_rows, d_sae, dtype=self.dtype, device=x.device)
        generator = torch.Generator().manual_seed(2)
        chosen = torch.randint(d_sae, (len(x), options["k"]), generator=generator)
        self.chosen = chosen.to(x.device)
        self.values = torch.rand(chosen.shape, generator=generator).to(x.device)
        self.offsets = torch.arange(0, chosen.numel() + 1, options["k"], device=x.device)

    @torch.no_grad()
    def step(self, x: Tensor) -> None:
        """Do every part."""
        rows = x.to(self.dtype)
        products = [partial(self._product, rows, size) for size in CHUNKS]
        self.parts = {
            "product": min(map(self._seconds, products)),
            "Adam": self._seconds(self.adam.step),
            "gathers": N_GATHERS * min(map(self._seconds, (self._bags, self._decoded))),
        }

    def _product(self, rows: Tensor, size: int) -> None:
        for part in torch.split(rows, size):
            torch.mm(part, self.half.T, out=self.scores[: len(part)])

    def _bags(self) -> None:
        functional.embedding_bag(
            self.chosen, self.weights[1], mode="sum", per_sample_weights=self.values
        )

    def _decoded(self) -> None:
        W, indices = self.weights[1].detach(), self.chosen.flatten().int()
        ops_for(W).decode(W, self.offsets, indices, self.values.flatten())

    def _seconds(self, work: Callable[[], object]) -> float:
        if self.half.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if self.half.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
