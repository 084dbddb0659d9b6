"""The sides of `step`: each takes a step on rows, and says how much of their variance was left."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.bound import Bound
from benchmarks.rows import Directions, HeldRows
from benchmarks.trainers import trainer_on
from sae_runner.kernels.choice import Kernels, using
from sae_runner.meters import peak_rss_mib
from sae_runner.training.recording import WARM_UP

N_BATCHES = 3
DEAD_SHARE = 10
"""With AuxK one latent in so many is dead."""
LR = 1e-4
AUXK = 1 / 32


class Side(Protocol):
    """One implementation of a step."""

    def step(self, x: Float[Tensor, "n d_in"]) -> Tensor | None:
        """Train on a batch; the sum of its squared errors, before the update."""
        ...


def first_rows(options: dict[str, Any]) -> Float[Tensor, "d_sae d_in"]:
    """The rows of both matrices that every side begins with."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(options["d_sae"], options["d_in"], generator=generator)
    return functional.normalize(drawn, dim=1)


class Dense(nn.Module):
    """A TopK SAE as one writes it down first, and what it takes to train it.

    z = W_enc (x − b_dec) + b_enc,  x̂ = TopK(z)₊ W_dec + b_dec,  mean of ‖x − x̂‖²
    """

    def __init__(self, options: dict[str, Any], x: Float[Tensor, "n d_in"]) -> None:
        super().__init__()
        self.options, device = options, x.device
        rows = first_rows(options).to(device)
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(len(rows), device=device))
        self.b_dec = nn.Parameter(x.mean(0))
        self.dead = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.dead[: len(rows) // DEAD_SHARE] = options["auxk"]
        self.k, self.k_aux = options["k"], options["d_in"] // 2
        fused = options["side"] == "dense-bf16"
        self.adam = torch.optim.Adam(self.parameters(), lr=LR, fused=fused or None)
        self.autocast = options["side"] == "dense-bf16"
        self.errors: Callable[[Tensor], tuple[Tensor, Tensor]] = self._errors
        if self.autocast and device.type == "cuda":
            self.errors = torch.compile(self._errors)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values and places of the k largest pre-activations, and all pre-activations."""
        pre_acts = functional.linear(x - self.b_dec, self.W_enc, self.b_enc)
        values, places = pre_acts.topk(self.k, dim=1, sorted=False)
        return values.relu(), places, pre_acts

    def decode(self, values: Tensor, places: Tensor, pre_acts: Tensor) -> Tensor:
        """The sum of chosen rows of W_dec, from dense latents."""
        return torch.zeros_like(pre_acts).scatter(1, places, values.to(pre_acts.dtype)) @ self.W_dec

    def _errors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error, and the loss: with AuxK, of what dead latents make of the error too."""
        values, places, pre_acts = self.encode(x)
        error = x - (self.decode(values, places, pre_acts) + self.b_dec)
        loss = error.square().sum(1).mean()
        if self.options["auxk"]:
            left = error.detach()
            of_dead = pre_acts.masked_fill(~self.dead, -torch.inf)
            values, places = of_dead.topk(self.k_aux, dim=1, sorted=False)
            explained = self.decode(values.relu(), places, pre_acts)
            loss = loss + AUXK * (left - explained).square().sum() / left.square().sum()
        return error.detach().square().sum(), loss

    def step(self, x: Tensor) -> Tensor:
        """See `Side`."""
        self.adam.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            error, loss = self.errors(x)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.options["unit"]:
            self._project()
        if self.options["clip"]:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.adam.step()
        if self.options["unit"]:
            with torch.no_grad():
                self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
        return error

    @torch.no_grad()
    def _project(self) -> None:
        assert self.W_dec.grad is not None
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad.sub_(along * self.W_dec)


class Sparsify(Dense):
    """The same as sparsify computes it."""

    def __init__(self, options: dict[str, Any], x: Float[Tensor, "n d_in"]) -> None:
        super().__init__(options, x)
        self.autocast = x.device.type == "cuda"

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Dense`; the gradient is of the chosen values alone."""
        found: tuple[Tensor, Tensor, Tensor] = _FusedEncoder.apply(
            x - self.b_dec, self.W_enc, self.b_enc, self.k
        )
        return found

    def decode(self, values: Tensor, places: Tensor, pre_acts: Tensor) -> Tensor:
        """See `Dense`; rows of W_dec are gathered and summed."""
        return functional.embedding_bag(
            places, self.W_dec, mode="sum", per_sample_weights=values.to(self.W_dec.dtype)
        )


class _FusedEncoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        pre_acts = functional.linear(x, W, b).relu()
        values, places = pre_acts.topk(k, dim=1, sorted=False)
        ctx.save_for_backward(x, W, places)
        ctx.mark_non_differentiable(places, pre_acts)
        return values, places, pre_acts

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        x, W, places = ctx.saved_tensors
        g = g.to(W.dtype)
        g_x = functional.embedding_bag(places, W, mode="sum", per_sample_weights=g)
        outer = g.unsqueeze(2) * x.unsqueeze(1)  # [n, k, d_in]
        g_W = torch.zeros_like(W).index_add_(0, places.flatten(), outer.flatten(0, 1))
        g_b = W.new_zeros(len(W)).index_add_(0, places.flatten(), g.flatten())
        return g_x, g_W, g_b, None


class Ours:
    """A step of `Trainer`, on rows that are there."""

    def __init__(self, options: dict[str, Any], x: Float[Tensor, "n d_in"]) -> None:
        kernels, how = options["side"].split("-")
        recorded = how == "recorded"
        self.kernels: Kernels = "torch" if kernels == "torch" else "auto"
        sae = {
            "d_sae": options["d_sae"], "k": options["k"], "input_scaling": "none",
            "loss_reduction": "sum", "b_dec_init": "mean",
            "decoder_norm": "unit" if options["unit"] else "free",
        }  # fmt: skip
        training = {
            "batch_size": len(x), "n_tokens": 10**6 * len(x), "lr": LR, "cuda_graph": recorded,
            "precision": "screened" if recorded else how, "lr_warmup": 0.0,
            "clip_grad_norm": 1.0 if options["clip"] else None,
        }  # fmt: skip
        auxk = {"type": "auxk", "coefficient": AUXK, "k_aux": options["d_in"] // 2}
        with using(self.kernels):
            self.trainer = trainer_on(
                HeldRows(x.cpu()), Path(os.devnull), sae, training, device=x.device.type,
                dead_latents=auxk if options["auxk"] else None,
            )  # fmt: skip
        with torch.no_grad():
            for weight in (self.trainer.sae.W_enc_rows, self.trainer.sae.W_dec):
                weight.copy_(first_rows(options))
        self.n_dead = options["d_sae"] // DEAD_SHARE if options["auxk"] else 0
        for _ in range(WARM_UP + 1 if recorded else 0):
            self.trainer.take_step(x)

    def step(self, x: Tensor) -> Tensor:
        """See `Side`."""
        dead = self.trainer.dead
        dead.rows_since_fired[: self.n_dead] = dead.window  # However often they fire.
        with using(self.kernels):
            taken, _, _ = self.trainer.take_step(x)
        return taken.last.parts["sse"] * len(x)


SIDES: dict[str, Callable[[dict[str, Any], Tensor], Side]] = {
    "dense": Dense, "dense-bf16": Dense, "sparsify": Sparsify, "bound": Bound,
    **{f"{k}-{p}": Ours for k in ("torch", "native", "triton") for p in ("fp32", "screened")},
    "triton-recorded": Ours,  # Screened too.
}  # fmt: skip


def prepare(options: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """See `visits`: a visit is some steps."""
    device = torch.device(options["device"])
    at_start = peak_rss_mib() if device.type == "cpu" else 0.0
    source = Directions(options["d_in"])
    batches = [source.rows(options["batch"]).to(device) for _ in range(N_BATCHES)]
    side = SIDES[options["side"]](options, batches[0])
    counted = -1

    def seconds_of(x: Tensor) -> tuple[float, Tensor | None]:
        if device.type != "cuda":
            start = time.perf_counter()
            error = side.step(x)
            return time.perf_counter() - start, error
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        ]
        torch.cuda.synchronize()
        events[0].record()
        error = side.step(x)
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1000, error

    def visit() -> dict[str, Any]:
        nonlocal counted
        seconds = 0.0
        for _ in range(options["steps"]):
            counted += 1
            x = batches[counted % N_BATCHES]
            spent, error = seconds_of(x)
            seconds += sum(side.parts.values()) if isinstance(side, Bound) else spent
        fvu = None
        if error is not None:
            fvu = float(error) / float((x - x.mean(0)).square().sum())
        cuda = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_rss_mib()
        return {
            "seconds": seconds / options["steps"], "fvu": fvu, "peak_mib": peak,
            "above_start_mib": peak - at_start,
            "parts": side.parts if isinstance(side, Bound) else {},
        }  # fmt: skip

    return visit
