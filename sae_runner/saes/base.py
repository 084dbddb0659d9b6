"""What a sparse autoencoder is here: encode, decode, a loss, and how its weights lie in memory.

    x_hat = decode(encode(x)),    encode: [n, d_in] → [n, d_sae],    decode affine in the latents

A latent is a *row* of both weight matrices in memory: `W_dec [d_sae, d_in]`, and `W_enc_rows
[d_sae, d_in]`, of which `W_enc [d_in, d_sae]` is a view. On disk `W_enc` is [d_in, d_sae] and
contiguous, the field's usual orientation.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from sae_runner.errors import ConfigError, StoreError

InputScaling = Literal["none", "sqrt_d", "unit_mean_square"]


@dataclass(frozen=True)
class Latents:
    """Sparse latents of n rows in CSR form: what travels between SAE, evaluators and disk."""

    offsets: Int64[Tensor, " n_plus_1"]
    """Row t owns the entries from offsets[t] to offsets[t + 1]."""
    indices: Int[Tensor, " nnz"]
    """Which latent each entry is of; ascending within a row."""
    values: Float[Tensor, " nnz"]
    d_sae: int

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "n d_sae"]) -> "Latents":
        """The non-zero entries of dense latents."""
        rows, indices = acts.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(acts))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(offsets, indices, acts[rows, indices], acts.shape[1])

    @classmethod
    def from_topk(
        cls, values: Float[Tensor, "n k"], indices: Int64[Tensor, "n k"], d_sae: int
    ) -> "Latents":
        """The non-zero ones of k chosen latents of each row."""
        indices, order = indices.sort(dim=1)
        values = values.gather(1, order)
        active = values != 0
        offsets = torch.cat([active.new_zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
        return cls(offsets, indices[active], values[active], d_sae)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> Int64[Tensor, " n"]:
        """How many latents are active in each row: the row's L0."""
        return self.offsets.diff()

    @property
    def rows(self) -> Int64[Tensor, " nnz"]:
        """The row of each entry."""
        return torch.repeat_interleave(
            torch.arange(len(self), device=self.offsets.device), self.counts
        )

    def dense(self) -> Float[Tensor, "n d_sae"]:
        """The same latents with their zeros. For small d_sae only."""
        acts = self.values.new_zeros(len(self), self.d_sae)
        acts[self.rows, self.indices] = self.values
        return acts


class SAEOutput(NamedTuple):
    """What `sae(x)` gives."""

    x_hat: Float[Tensor, "n d_in"]
    """Reconstruction, in the units of x."""
    latents: Latents


class Loss(NamedTuple):
    """What the trainer minimises in one step, and what it logs of it."""

    total: Float[Tensor, ""]
    parts: dict[str, Tensor]
    """Summands of `total` before any weighting, by name, and other scalars worth a curve."""
    x_hat: Float[Tensor, "n d_in"]
    """Reconstruction in the units of x."""
    fired: Int64[Tensor, " d_sae"]
    """How many rows of the batch each latent was active in."""
    l0: Float[Tensor, ""]
    """Mean number of active latents of a row."""


class TrainState(NamedTuple):
    """What a loss may depend on besides the batch."""

    dead: Bool[Tensor, " d_sae"] | None = None
    """Latents that have not fired for `trainer.dead_window` rows."""
    penalty: float = 1.0
    """Factor on the sparsity penalty, from its warm-up schedule."""


class ActivationStats(NamedTuple):
    """What initialisation may know of the training activations."""

    mean: Float[Tensor, " d_in"]
    mean_norm: float
    """E‖x‖₂"""
    mean_square_norm: float
    """E‖x‖₂²"""
    sample: Float[Tensor, "n d_in"]
    """Some shuffled rows."""


class SAE(nn.Module):
    """Base of every architecture: the weights, the affine decoder, scaling and folding.

    `input_scale` s multiplies what comes in and divides what goes out, so that losses and learning
    rates see activations of a standard size; `fold` moves it into the weights.
    """

    kind: ClassVar[str]
    """The `type:` it is registered under."""

    def __init__(
        self, d_in: int, d_sae: int, *, input_scaling: InputScaling, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        self.input_scaling = input_scaling
        self.options = options
        self.W_enc_rows = nn.Parameter(torch.empty(d_sae, d_in))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("input_scale", torch.ones(()))

    input_scale: Tensor

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The encoder in the field's orientation; a view of `W_enc_rows`."""
        return self.W_enc_rows.T

    # -- The map ---------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Dense latents: the definition, for small cases and as reference."""

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> Latents:
        """The same latents, sparse."""
        return Latents.from_dense(self.encode(x))

    def decode(self, latents: Latents | Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        """`x_hat = (f W_dec + b_dec) / s`."""
        if isinstance(latents, Latents):
            summed = nn.functional.embedding_bag(
                latents.indices,
                self.W_dec,
                latents.offsets,
                mode="sum",
                per_sample_weights=latents.values.to(self.W_dec.dtype),
                include_last_offset=True,
            )
        else:
            summed = latents @ self.W_dec
        return (summed + self.b_dec) / self.input_scale

    def forward(self, x: Float[Tensor, "n d_in"]) -> SAEOutput:
        """Latents and reconstruction of raw activations."""
        latents = self.encode_sparse(x)
        return SAEOutput(self.decode(latents), latents)

    # -- Training --------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """What a step minimises on raw activations x."""

    @abstractmethod
    def initialise(self, stats: ActivationStats, generator: torch.Generator) -> None:
        """Draw the weights, given the training activations."""

    def set_input_scale(self, stats: ActivationStats) -> None:
        """Choose s: E‖sx‖ = √d (`sqrt_d`), E‖sx‖² = 1 (`unit_mean_square`), or 1."""
        scale = 1.0
        if self.input_scaling == "sqrt_d":
            scale = self.d_in**0.5 / max(stats.mean_norm, 1e-12)
        elif self.input_scaling == "unit_mean_square":
            scale = max(stats.mean_square_norm, 1e-24) ** -0.5
        self.input_scale.fill_(scale)

    def before_step(self) -> None:
        """Called after backward and before clipping: constraints on gradients."""

    def after_step(self) -> None:
        """Called after the optimizer's step: constraints on weights."""

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from each decoder row's gradient its part along the row (unit-norm decoders)."""
        if self.W_dec.grad is not None:
            direction = nn.functional.normalize(self.W_dec, dim=1)
            along = (self.W_dec.grad * direction).sum(1, keepdim=True)
            self.W_dec.grad.addcmul_(along, direction, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring every decoder row back to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    # -- Storing ---------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self) -> "SAE":
        """Move `input_scale` into the weights: latents change units, `sae(x)` does not change.

        With s: z = (s x − b_dec) W_enc + b_enc. Here W_enc is kept and b_enc, b_dec are divided by
        s, which divides every pre-activation by s; decode multiplies it back.
        """
        self.b_enc.div_(self.input_scale)
        self.b_dec.div_(self.input_scale)
        self.input_scale.fill_(1.0)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk: every weight, `W_enc` as [d_in, d_sae]."""
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        state["W_enc"] = state.pop("W_enc_rows").T.contiguous()
        return state

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take weights from disk.

        Raises:
            StoreError: a tensor is missing, surplus or of another shape.
        """
        state = dict(tensors)
        if "W_enc" in state:
            state["W_enc_rows"] = state.pop("W_enc").T
        own = self.state_dict()
        if missing := sorted(own.keys() ^ state.keys()):
            raise StoreError(
                f"checkpoint of type {self.type!r}: tensor {missing[0]!r} does not fit"
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                found, wanted = tuple(state[name].shape), tuple(tensor.shape)
                raise StoreError(f"checkpoint: {name} has shape {found}, expected {wanted}")
            tensor.copy_(state[name])

    def config(self) -> dict[str, Any]:
        """`type`, sizes and options: what `cfg.json` keeps and `SAES.build` takes."""
        return {**self.options, "type": self.kind, "d_sae": self.d_sae, "expansion": None}


def width(d_in: int, d_sae: int | None, expansion: float | None) -> int:
    """The number of latents from exactly one of `d_sae` and `expansion`.

    Raises:
        ConfigError: both or neither are given.
    """
    if (d_sae is None) == (expansion is None):
        given = "both" if d_sae is not None else "neither"
        raise ConfigError(
            f"sae.d_sae={d_sae} and sae.expansion={expansion}: {given} given; "
            "exactly one is needed, set the other to null"
        )
    return d_sae if d_sae is not None else max(1, round(d_in * float(expansion or 0)))
