"""What a sparse autoencoder is here: encode, decode, a loss, and how its weights lie in memory.

    x_hat = decode(encode(x)),    encode: [n, d_in] → [n, d_sae],    decode affine in the latents

A latent is a *row* of both weight matrices in memory: `W_dec [d_sae, d_in]`, and `W_enc_rows
[d_sae, d_in]`, of which `W_enc [d_in, d_sae]` is a view. On disk `W_enc` is [d_in, d_sae] and
contiguous, the field's usual orientation.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sae_runner.kernels import autograd
from sae_runner.kernels.selection import Entries
from sae_runner.saes._initialisation import geometric_median, random_directions
from sae_runner.saes._latents import Latents as Latents
from sae_runner.saes._latents import sum_rows as sum_rows
from sae_runner.saes._options import Common as Common
from sae_runner.saes._options import width as width
from sae_runner.saes._pre_acts import FEW, All, Few
from sae_runner.saes._pre_acts import PreActs as PreActs
from sae_runner.saes._scaling import ScaledOnce as ScaledOnce
from sae_runner.saes._weights import Weights
from sae_runner.statistics import ActivationStats

ENCODE_CHUNK_BYTES = 64 * 2**20
"""Dense pre-activations that `encode_sparse` holds at a time."""


class SAEOutput(NamedTuple):
    """What `sae(x)` gives."""

    x_hat: Float[Tensor, "n d_out"]
    """Reconstruction, in the units of x."""
    latents: Latents


class Loss(NamedTuple):
    """What the trainer minimises in one step, and what it logs of it."""

    total: Float[Tensor, ""]
    parts: dict[str, Tensor]
    """Summands of `total` before any weighting, by name, and other scalars worth a curve."""
    x_hat: Float[Tensor, "n d_out"]
    """Reconstruction in the units of x, with its gradient: `total` uses it, and others may."""
    fired: Int64[Tensor, " d_sae"]
    """How many rows of the batch each latent was active in."""
    l0: Float[Tensor, ""]
    """Mean number of active latents of a row."""
    residual: Float[Tensor, "n d_out"]
    """What the reconstruction leaves over, in scaled units; no gradient flows through it."""
    x: Float[Tensor, "n width"]
    """The rows that it is the loss of."""
    error: Float[Tensor, ""]
    """The summand of `total` that is the error of `x_hat`, with its gradient."""
    rest: Float[Tensor, ""]
    """The other summands, weighted: sparsity, a gate's own error."""


class TrainState(NamedTuple):
    """What a loss may depend on besides the batch."""

    penalty: float = 1.0
    """Factor on the sparsity penalty, from its warm-up and from the control of the L0."""
    progress: float = 1.0
    """Share of the steps that are done: 0 at the first, 1 after the last."""
    per_step: float = 0.0
    """Share of the steps that one is; 0 where no step is to follow."""


class SAE(Weights):
    """Base of every architecture: the map from activations to latents and back, and its training.

    Raises:
        ConfigError: see `Weights`.
    """

    penalised: bool = False
    """Whether a penalty leads to the L0, so that `target_l0` is reached by controlling it."""
    resampling_refused: ClassVar[str] = ""
    """Why its latents cannot be pointed at chosen directions, if they cannot."""
    end_to_end_refused: str = ""
    """Why a model's output cannot stand in for the error of its reconstruction, if it cannot."""
    pre_act_refused: ClassVar[str] = ""
    """Why raising a pre-activation to its threshold would make no latent fire, if it would not."""
    recording_refused: str = (
        "how many latents a step looks at hangs on the batch; set it to false, or sae=topk"
    )
    """Why a step of it cannot be recorded once for all batches of a size, if it cannot."""
    no_pre_acts: ClassVar[str] = ""
    """Why no pre-activation says how close a latent is to firing, if none does."""
    sparse: ClassVar[bool] = False
    """Whether its loss never makes [n, d_sae] latents, so that its gradients are sparse too."""
    calibrates: ClassVar[bool] = False
    """Whether it has a threshold that `calibrate` must measure before it is saved."""

    # -- The map ---------------------------------------------------------------------------------

    def pre_activations(
        self, scaled: Float[Tensor, "n d_in"], latents: Int64[Tensor, " m"] | None = None
    ) -> Float[Tensor, "n m"]:
        """Z = (x − b_dec) W_enc + b_enc of scaled rows, of all latents or of some."""
        rows: Tensor = self.W_enc_rows
        if latents is not None:
            rows = autograd.rows_of(rows, latents)
        bias: Tensor = self.b_enc if latents is None else self.b_enc[latents]
        centred = scaled - self.b_dec if self.apply_b_dec_to_input else scaled
        return nn.functional.linear(centred, rows, bias)

    def strongest(
        self, pre_acts: Float[Tensor, "n m"], k: int
    ) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
        """Activations and places of the k largest pre-activations of each row."""
        values, indices = pre_acts.topk(k, dim=1, sorted=False)
        return values.relu(), indices

    @property
    def centre(self) -> Float[Tensor, " d_in"] | None:
        """What is taken from scaled rows before they are encoded."""
        return self.b_dec if self.apply_b_dec_to_input else None

    def centred(self, scaled: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Scaled rows as the encoder sees them; no gradient."""
        return scaled if self.centre is None else scaled - self.centre.detach()

    def scored(
        self, scaled: Float[Tensor, "n d_in"], centred: Float[Tensor, "n d_in"], entries: Entries
    ) -> Latents:
        """Pre-activations of chosen entries, whose values are known, with their gradient."""
        values = entries.values
        latents = Latents(entries.offsets, entries.indices, values, self.d_sae)
        return latents.with_values(
            autograd.selected_scores(
                scaled, self.W_enc_rows, self.b_enc, self.centre, latents.selection, values, centred
            )
        )

    def above(self, scaled: Float[Tensor, "n d_in"], floor: Float[Tensor, " d_sae"]) -> PreActs:
        """Pre-activations of which none at or below its latent's floor matters to a loss.

        Some rows tell whether few are above it. They are of the batch, so that a resumed training
        decides as one that was never stopped.
        """
        with torch.no_grad():
            sample = self.pre_activations(scaled[:: -(-len(scaled) // 64)])
            many = (sample > floor).float().mean() > FEW
        if many:
            return All(self.pre_activations(scaled))
        centred = self.centred(scaled)
        entries = self.selector.above(centred, self.W_enc_rows, self.b_enc, floor)
        return Few(self.scored(scaled, centred, entries))

    def reconstruct(
        self,
        latents: Latents,
        target: Float[Tensor, "n d_out"],
        base: Tensor,
        centred: Float[Tensor, "n d_in"] | None = None,
    ) -> autograd.Reconstruction:
        """x̂ = base + f W_dec, and the squared error of each row, both with their gradient.

        With `centred` the target is the scaled rows that it was made of: where they are centred at
        the base, what latents have to give is there already.
        """
        wanted = centred if base is self.centre else None
        return autograd.reconstruct(
            latents.values, self.W_dec, base, target, latents.selection, wanted
        )

    @abstractmethod
    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Dense latents: the definition, for small cases and as reference."""

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> Latents:
        """The same latents, sparse; few rows at a time are ever dense."""
        return Latents.concatenate([self.encode_chunk(part) for part in self.chunks(x)])

    def chunks(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "m d_in"], ...]:
        """Parts of x whose dense pre-activations fit in ENCODE_CHUNK_BYTES."""
        n_rows = max(1, ENCODE_CHUNK_BYTES // (self.d_sae * self.b_dec.element_size()))
        return torch.split(x, n_rows)

    def encode_chunk(self, x: Float[Tensor, "n d_in"]) -> Latents:
        """Sparse latents of so few rows that [n, d_sae] fits; rows must not depend on others."""
        return Latents.from_dense(self.encode(x))

    def decode_scaled(
        self, latents: Latents | Float[Tensor, "n d_sae"]
    ) -> Float[Tensor, "n d_out"]:
        """`f W_dec + b_dec`: the reconstruction of scaled rows."""
        if isinstance(latents, Latents):
            summed = sum_rows(self.W_dec, latents.indices, latents.values, latents.offsets)
        else:
            summed = latents @ self.W_dec
        return summed + self.b_dec

    def decode(self, latents: Latents | Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_out"]:
        """The reconstruction in the units of x; with layer norm, of normalised rows."""
        return self.unscaled(self.decode_scaled(latents))

    def forward(self, x: Float[Tensor, "n d_in"]) -> SAEOutput:
        """Latents and reconstruction of raw activations."""
        latents = self.encode_sparse(x)
        return SAEOutput(self.unscaled(self.decode_scaled(latents), x), latents)

    # -- Training --------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """What a step minimises on raw activations x."""

    def error(
        self, square: Float[Tensor, " n"], scaled: Float[Tensor, "n d_out"]
    ) -> tuple[str, Float[Tensor, ""]]:
        """Squared errors of rows, reduced as `loss_reduction` says, and what that is called.

        sum: mean over rows; mean: over d_in too; normalised: the latter, by the error of always
        predicting the mean activation (Gao et al. 2024, §2.1); row_norm: mean of r² / ‖x‖.
        """
        match self.loss_reduction:
            case "sum":
                return "sse", square.mean()
            case "mean":
                return "mse", square.mean() / self.d_out
            case "normalised":
                return "normalised_mse", square.mean() / self.d_out / self.mean_baseline_mse
            case "row_norm":
                norms = scaled.norm(dim=1)
                # Nearly empty rows would outweigh all others.
                norms = torch.maximum(norms, 0.01 * norms.mean()).clamp_min(1e-12)
                return "mse_by_norm", (square / norms).mean() / self.d_out

    def loss_of(
        self,
        x: Float[Tensor, "n width"],
        scaled: Float[Tensor, "n d_out"],
        found: autograd.Reconstruction,
        fired: Int64[Tensor, " d_sae"],
        **terms: tuple[float, Tensor],
    ) -> Loss:
        """The squared error of what is found (scaled) plus `coefficient · value` of each term."""
        name, error = self.error(found.square, scaled)
        parts, total, rest = {name: error.detach()}, error, error.new_zeros(())
        for term, (coefficient, value) in terms.items():
            weighted = coefficient * value
            total, rest = total + weighted, rest + weighted
            parts[term] = value.detach()
        l0 = fired.sum() / max(len(x), 1)
        x_hat = self.unscaled(found.x_hat, x)
        return Loss(total, parts, x_hat, fired, l0, found.residual, x, error, rest)

    def initialise(self, stats: ActivationStats, generator: torch.Generator) -> None:
        """Set scales from `stats`, and draw the weights on the generator's device.

        Raises:
            DataError: the loss is `normalised` and all activations are equal.
        """
        self.set_input_scale(stats)
        self.initialise_weights(stats, generator)

    @torch.no_grad()
    def initialise_weights(self, stats: ActivationStats, generator: torch.Generator) -> None:
        """Random decoder directions of one norm; encoder and b_dec as the options say."""
        norm = self.options["decoder_init_norm"]
        self.W_dec.copy_(norm * random_directions(self.d_sae, self.d_in, generator))
        self.W_enc_rows.copy_(self.W_dec)
        if self.options["encoder_init"] == "random":
            self.W_enc_rows.copy_(norm * random_directions(self.d_sae, self.d_in, generator))
        self.b_enc.zero_()
        self.initialise_b_dec(stats)
        if self.options["encoder_init"] == "matched":
            self.match_encoder(stats.sample[:1024])

    @torch.no_grad()
    def initialise_b_dec(self, stats: ActivationStats) -> None:
        """Set b_dec to zero or to a centre of the scaled activations."""
        if self.b_dec_init == "zero":
            self.b_dec.zero_()
        elif self.b_dec_init == "mean" and self.input_scaling != "layer_norm":
            self.b_dec.copy_(self.scaled(stats.mean.unsqueeze(0))[0])
        else:
            sample = self.scaled(stats.sample.float())
            mean = self.b_dec_init == "mean"
            self.b_dec.copy_(sample.mean(0) if mean else geometric_median(sample))

    @torch.no_grad()
    def match_encoder(self, sample: Float[Tensor, "n d_in"]) -> None:
        """Scale the encoder so that x̂ − b_dec is as long as x − b_dec (openai's initialisation)."""
        scaled = self.scaled(sample)
        wanted = (scaled - self.b_dec).norm(dim=1).mean()
        found = (self.decode_scaled(self.encode(sample)) - self.b_dec).norm(dim=1).mean()
        if found > 0:  # Else nothing fires, at whatever length.
            self.W_enc_rows.mul_(wanted / found)

    def before_step(self) -> None:
        """Called after backward and before clipping: constraints on gradients."""
        if self.decoder_norm == "unit":
            self.remove_parallel_gradient()

    def after_step(self, *, normalised: bool = False) -> None:
        """Called after the optimizer's step: constraints on weights.

        Decoder rows that must be are `normalised` already where the step did it.
        """
        if self.decoder_norm == "unit" and not normalised:
            self.normalise_decoder()

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

    @torch.no_grad()
    def reset_latents(
        self, latents: Int64[Tensor, " m"], directions: Float[Tensor, "m d_in"], norm: float
    ) -> None:
        """Point latents at unit `directions`: decoder rows along them, encoder rows of `norm`."""
        length = 1.0 if self.decoder_norm == "unit" else self.W_dec.norm(dim=1).mean()
        self.W_dec[latents] = length * directions.to(self.W_dec)
        self.W_enc_rows[latents] = norm * directions.to(self.W_enc_rows)
        self.b_enc[latents] = 0

    def thresholds(self, latents: Int64[Tensor, " m"]) -> Float[Tensor, " m"]:
        """The pre-activation above which each of these latents fires."""
        return self.b_enc.new_zeros(len(latents))

    def settle(self, progress: float) -> None:
        """Become what it is for use when this share of training is done.

        Of what comes to its value by a schedule, such as k, it takes the value of that moment, and
        says so in `config`. Called on the copy that is saved, before `calibrate`.
        """
        return

    def calibrate(self, batches: Iterator[Float[Tensor, "n d_in"]], n_rows: int) -> float:
        """Set what inference needs and training does not, from held-out rows; their mean L0 then.

        At most `n_rows` come, which bounds what must be kept of them. It is called on the copy that
        is saved for use.
        """
        raise NotImplementedError
