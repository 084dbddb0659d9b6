"""What a sparse autoencoder is here: encode, decode, a loss, and how its weights lie in memory.

    x_hat = decode(encode(x)),    encode: [n, d_in] → [n, d_sae],    decode affine in the latents

A latent is a *row* of both weight matrices in memory: `W_dec [d_sae, d_in]`, and `W_enc_rows
[d_sae, d_in]`, of which `W_enc [d_in, d_sae]` is a view. On disk `W_enc` is [d_in, d_sae] and
contiguous, the field's usual orientation.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_runner.errors import ConfigError, StoreError
from sae_runner.saes._initialisation import geometric_median, random_directions
from sae_runner.saes._latents import Latents as Latents
from sae_runner.saes._latents import sum_rows as sum_rows
from sae_runner.statistics import ActivationStats

InputScaling = Literal["none", "sqrt_d", "unit_mean_square"]
BiasInit = Literal["zero", "mean", "geometric_median"]

ENCODE_CHUNK_BYTES = 64 * 2**20
"""Dense pre-activations that `encode_sparse` holds at a time."""


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
        """The same latents, sparse; few rows at a time are ever dense."""
        n_rows = max(1, ENCODE_CHUNK_BYTES // (self.d_sae * self.W_enc_rows.element_size()))
        return Latents.concatenate([self.encode_chunk(part) for part in torch.split(x, n_rows)])

    def encode_chunk(self, x: Float[Tensor, "n d_in"]) -> Latents:
        """Sparse latents of so few rows that [n, d_sae] fits; rows must not depend on others."""
        return Latents.from_dense(self.encode(x))

    def decode(self, latents: Latents | Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        """`x_hat = (f W_dec + b_dec) / s`."""
        if isinstance(latents, Latents):
            summed = sum_rows(self.W_dec, latents.indices, latents.values, latents.offsets)
        else:
            summed = latents @ self.W_dec
        return (summed + self.b_dec) / self.input_scale

    def scaled(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """`s x`, in the precision of the weights: what the weights and the losses see."""
        return x.to(self.b_dec.dtype) * self.input_scale

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
        """Set the input scale, and draw the weights on the generator's device."""

    def set_input_scale(self, stats: ActivationStats) -> None:
        """Choose s: E‖sx‖ = √d (`sqrt_d`), E‖sx‖² = 1 (`unit_mean_square`), or 1."""
        scale = 1.0
        if self.input_scaling == "sqrt_d":
            scale = self.d_in**0.5 / max(stats.mean_norm, 1e-12)
        elif self.input_scaling == "unit_mean_square":
            scale = max(stats.mean_square_norm, 1e-24) ** -0.5
        self.input_scale.fill_(scale)

    @torch.no_grad()
    def initialise_weights(self, decoder_norm: float, generator: torch.Generator) -> None:
        """Random decoder directions of one norm, the encoder their copy, biases zero."""
        self.W_dec.copy_(decoder_norm * random_directions(self.d_sae, self.d_in, generator))
        self.W_enc_rows.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.zero_()

    @torch.no_grad()
    def initialise_b_dec(self, stats: ActivationStats, how: BiasInit) -> None:
        """Set b_dec to zero or to a centre of the activations; needs `set_input_scale` before."""
        if how == "zero":
            self.b_dec.zero_()
            return
        centre = stats.mean if how == "mean" else geometric_median(stats.sample.float())
        self.b_dec.copy_(centre.to(self.b_dec) * self.input_scale)

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

    @torch.no_grad()
    def unfold(self, scale: float) -> "SAE":
        """Undo `fold` for the input scale `scale`: `sae(x)` does not change."""
        self.b_enc.mul_(scale)
        self.b_dec.mul_(scale)
        self.input_scale.fill_(scale)
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
        own = self.tensors()
        if wrong := sorted(own.keys() ^ tensors.keys()):
            what = "lacks" if wrong[0] in own else "has a surplus"
            raise StoreError(f"checkpoint of type {self.kind!r} {what} tensor {wrong[0]!r}")
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape:
                found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
                raise StoreError(f"checkpoint: {name} has shape {found}, expected {wanted}")
        for name, tensor in self.state_dict().items():
            stored = tensors["W_enc"].T if name == "W_enc_rows" else tensors[name]
            tensor.copy_(stored)

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
            f"sae.d_sae={_text(d_sae)} and sae.expansion={_text(expansion)}: {given} given; "
            "exactly one is needed, set the other to null"
        )
    return d_sae if d_sae is not None else max(1, round(d_in * float(expansion or 0)))


def _text(value: float | None) -> str:
    return "null" if value is None else f"{value:.12g}"
