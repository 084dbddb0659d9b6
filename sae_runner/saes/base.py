"""What a sparse autoencoder is here: encode, decode, a loss, and how its weights lie in memory.

    x_hat = decode(encode(x)),    encode: [n, d_in] → [n, d_sae],    decode affine in the latents

A latent is a *row* of both weight matrices in memory: `W_dec [d_sae, d_in]`, and `W_enc_rows
[d_sae, d_in]`, of which `W_enc [d_in, d_sae]` is a view. On disk `W_enc` is [d_in, d_sae] and
contiguous, the field's usual orientation.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict, Unpack, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sae_runner.config import Positive, PositiveFloat
from sae_runner.errors import ConfigError, DataError, StoreError
from sae_runner.saes import _scaling
from sae_runner.saes._initialisation import geometric_median, random_directions
from sae_runner.saes._latents import Latents as Latents
from sae_runner.saes._latents import sum_rows as sum_rows
from sae_runner.saes._scaling import InputScaling as InputScaling
from sae_runner.statistics import ActivationStats

LossReduction = Literal["sum", "mean", "normalised", "row_norm"]

ENCODE_CHUNK_BYTES = 64 * 2**20
"""Dense pre-activations that `encode_sparse` holds at a time."""


class Common(TypedDict):
    """Options of every architecture; `configs/sae/topk.yaml` says what each means."""

    d_sae: Positive | None
    expansion: PositiveFloat | None
    target_l0: PositiveFloat | None
    input_scaling: InputScaling
    loss_reduction: LossReduction
    units: list[str] | None
    apply_b_dec_to_input: bool
    b_dec_init: Literal["zero", "mean", "geometric_median"]
    encoder_init: Literal["transposed", "matched", "random"]
    decoder_init_norm: PositiveFloat
    decoder_norm: Literal["unit", "free"]


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
    """Reconstruction in the units of x."""
    fired: Int64[Tensor, " d_sae"]
    """How many rows of the batch each latent was active in."""
    l0: Float[Tensor, ""]
    """Mean number of active latents of a row."""
    residual: Float[Tensor, "n d_out"]
    """What the reconstruction leaves over, in scaled units; no gradient flows through it."""


class TrainState(NamedTuple):
    """What a loss may depend on besides the batch."""

    penalty: float = 1.0
    """Factor on the sparsity penalty, from its warm-up and from the control of the L0."""
    progress: float = 1.0
    """Share of the steps that are done: 0 at the first, 1 after the last."""


class SAE(nn.Module):
    """Base of every architecture: the weights, the affine decoder, scaling and folding.

    What comes in is scaled, so that losses and learning rates see activations of a standard size;
    `fold` moves what is affine of that into the weights.

    Raises:
        ConfigError: options contradict each other, or coefficients are used in other units than
            those they were published for.
    """

    kind: ClassVar[str]
    """The `type:` it is registered under."""
    penalised: bool = False
    """Whether a penalty leads to the L0, so that `target_l0` is reached by controlling it."""
    resampling_refused: ClassVar[str] = ""
    """Why its latents cannot be pointed at chosen directions, if they cannot."""
    pre_act_refused: ClassVar[str] = ""
    """Why raising a pre-activation to its threshold would make no latent fire, if it would not."""
    stored_names: ClassVar[dict[str, str]] = {}
    """Names on disk of weights that are published under another name than the base's."""
    training_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers that a resume needs and use does not: a folded SAE is stored without them."""

    def __init__(self, d_in: int, *, options: dict[str, Any], **common: Unpack[Common]) -> None:
        super().__init__()
        self.d_in = d_in
        if not hasattr(self, "d_out"):  # A transcoder has set it.
            self.d_out = d_in
        self.d_sae = width(d_in, common["d_sae"], common["expansion"])
        self.options = {**common, **options}
        self.target_l0 = common["target_l0"]
        self.input_scaling, self.loss_reduction = common["input_scaling"], common["loss_reduction"]
        self.apply_b_dec_to_input = common["apply_b_dec_to_input"]
        self.decoder_norm, self.b_dec_init = common["decoder_norm"], common["b_dec_init"]
        self._check_options(common)
        self.make_weights()
        self.register_buffer("input_scale", torch.ones(()))
        if self.loss_reduction == "normalised":
            self.register_buffer("mean_baseline_mse", torch.ones(()))
        if self.input_scaling == "whitening":
            self.register_buffer("input_mean", torch.zeros(d_in))
            self.register_buffer("whitening", torch.eye(d_in))
            self.register_buffer("unwhitening", torch.eye(d_in))

    d_out: int
    """Width of what is reconstructed."""
    input_scale: Tensor
    """s; 1 where rows are normalised or whitened, and after `fold`."""
    mean_baseline_mse: Tensor
    """MSE of predicting the dataset's mean, in scaled units: what `normalised` divides by."""
    input_mean: Tensor
    whitening: Tensor
    unwhitening: Tensor

    def make_weights(self) -> None:
        """Register the parameters; a kind whose weights are computed or tied has others."""
        self.W_enc_rows = nn.Parameter(torch.empty(self.d_sae, self.d_in))
        self.W_dec = nn.Parameter(torch.empty(self.d_sae, self.d_out))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    def _check_options(self, common: Common) -> None:
        if common["decoder_norm"] == "unit" and common["decoder_init_norm"] != 1:
            raise ConfigError(
                f"sae.decoder_init_norm={common['decoder_init_norm']:g}: decoder rows are kept at "
                "norm 1; set it to 1, or sae.decoder_norm=free"
            )
        if common["target_l0"] is not None and common["target_l0"] > self.d_sae:
            raise ConfigError(
                f"sae.target_l0={common['target_l0']:g}: must be <= d_sae={self.d_sae}"
            )
        own = {"input_scaling": self.input_scaling, "loss_reduction": self.loss_reduction}
        for key, value in own.items():
            others = [unit for unit in common["units"] or () if unit in UNITS[key]]
            if others and value not in others:
                raise ConfigError(
                    f"sae.{key}={value}: the coefficients of this recipe are for {others[0]}; set "
                    f"sae.{key}={others[0]}, or choose your own and set sae.units=null"
                )

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The encoder in the field's orientation; a view of `W_enc_rows`."""
        return self.W_enc_rows.T

    # -- Units -----------------------------------------------------------------------------------

    def scaled(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """What the weights and the losses see of x, in the precision of the weights."""
        x = x.to(self.b_dec.dtype)
        if self.input_scaling == "layer_norm":
            rows = _scaling.rows_of(x)
            return (x - rows.mean) / (rows.deviation + _scaling.EPSILON)
        if self.input_scaling == "whitening":
            return (x - self.input_mean) @ self.whitening
        return x * self.input_scale

    def unscaled(
        self, x_hat: Float[Tensor, "n d_out"], x: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """Undo `scaled`; layer norm is undone only with the rows x that it normalised."""
        if self.input_scaling == "layer_norm":
            if x is None:
                return x_hat
            rows = _scaling.rows_of(x.to(x_hat.dtype))
            return x_hat * rows.deviation + rows.mean
        if self.input_scaling == "whitening":
            return x_hat @ self.unwhitening + self.input_mean
        return x_hat / self.input_scale

    def input_of(self, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n d_in"]:
        """What it encodes of a store's rows: all, but for a transcoder."""
        return rows

    def target_of(self, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n d_out"]:
        """What it reconstructs of a store's rows: all, but for a transcoder."""
        return rows

    # -- The map ---------------------------------------------------------------------------------

    def pre_activations(
        self, scaled: Float[Tensor, "n d_in"], latents: Int64[Tensor, " m"] | None = None
    ) -> Float[Tensor, "n m"]:
        """Z = (x − b_dec) W_enc + b_enc of scaled rows, of all latents or of some."""
        rows: Tensor = self.W_enc_rows if latents is None else self.W_enc_rows[latents]
        bias: Tensor = self.b_enc if latents is None else self.b_enc[latents]
        centred = scaled - self.b_dec if self.apply_b_dec_to_input else scaled
        return nn.functional.linear(centred, rows, bias)

    def strongest(
        self, pre_acts: Float[Tensor, "n m"], k: int
    ) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
        """Activations and places of the k largest pre-activations of each row."""
        values, indices = pre_acts.topk(k, dim=1, sorted=False)
        return values.relu(), indices

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
        x_hat: Float[Tensor, "n d_out"],
        fired: Int64[Tensor, " d_sae"],
        **terms: tuple[float, Tensor],
    ) -> Loss:
        """The squared error of `x_hat` (scaled) plus `coefficient · value` of each further term."""
        residual = scaled - x_hat
        name, total = self.error(residual.square().sum(1), scaled)
        parts = {name: total.detach()}
        for term, (coefficient, value) in terms.items():
            total = total + coefficient * value
            parts[term] = value.detach()
        l0 = fired.sum() / max(len(x), 1)
        x_hat = self.unscaled(x_hat.detach(), x)
        return Loss(total, parts, x_hat, fired, l0, residual.detach())

    def initialise(self, stats: ActivationStats, generator: torch.Generator) -> None:
        """Set scales from `stats`, and draw the weights on the generator's device.

        Raises:
            DataError: the loss is `normalised` and all activations are equal.
        """
        self.set_input_scale(stats)
        self.initialise_weights(stats, generator)

    @torch.no_grad()
    def set_input_scale(self, stats: ActivationStats) -> None:
        """Learn from `stats` what `scaled` does, and what a normalised loss divides by."""
        self.input_scale.fill_(_scaling.factor(stats, self.input_scaling, self.d_in))
        if self.input_scaling == "whitening":
            found = _scaling.whitening_of(stats)
            self.input_mean.copy_(found.mean)
            self.whitening.copy_(found.forward)
            self.unwhitening.copy_(found.backward)
        if self.loss_reduction == "normalised":
            sample = self.scaled(stats.sample).cpu().double()  # On the CPU: Metal has no float64.
            mean = self.scaled(stats.mean.unsqueeze(0)).cpu().double()
            if self.input_scaling == "layer_norm":  # Which the mean row does not go through.
                mean = sample.mean(0, keepdim=True)
            self.set_baseline(sample, mean)

    def set_baseline(
        self, sample: Float[Tensor, "n d_out"], mean: Float[Tensor, "1 d_out"]
    ) -> None:
        """Learn what a normalised loss divides by: the error of predicting the mean."""
        baseline = (sample - mean).square().mean()
        if not baseline > 0:
            raise DataError("sae.loss_reduction=normalised: all training activations are equal")
        self.mean_baseline_mse.copy_(baseline)

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

    def after_step(self) -> None:
        """Called after the optimizer's step: constraints on weights."""
        if self.decoder_norm == "unit":
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

    calibrates: ClassVar[bool] = False
    """Whether it has a threshold that `calibrate` must measure before it is saved."""

    def calibrate(self, batches: Iterator[Float[Tensor, "n d_in"]], n_rows: int) -> float:
        """Set what inference needs and training does not, from held-out rows; their mean L0 then.

        At most `n_rows` come, which bounds what must be kept of them. It is called on the copy that
        is saved for use.
        """
        raise NotImplementedError

    # -- Storing ---------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self) -> "SAE":
        """Move what is affine of the scaling into the weights: `sae(x)` does not change.

        With s: z = (s x − b_dec) W_enc + b_enc. Here W_enc is kept and b_enc, b_dec are divided by
        s, which divides every pre-activation by s; decode multiplies it back. Whitening A goes
        into both matrices and leaves the latents as they are.
        """
        for name in self.training_buffers:
            self.register_buffer(name, getattr(self, name), persistent=False)
        if self.input_scaling == "whitening":
            self._transform(self.whitening, self.unwhitening)
            self.b_dec.add_(self.input_mean)
            if not self.apply_b_dec_to_input:
                self.shift_latents(-(self.W_enc_rows @ self.input_mean))
            self._end_whitening()
            return self
        if self.loss_reduction == "normalised":
            self.mean_baseline_mse.div_(self.input_scale**2)
        self.scale_latents(1 / self.input_scale)
        self.b_dec.div_(self.input_scale)
        self.input_scale.fill_(1.0)
        return self

    @torch.no_grad()
    def unfold_like(self, other: "SAE") -> "SAE":
        """Undo `fold` for the input scaling of `other`: `sae(x)` does not change."""
        if other.input_scaling == "whitening":
            if not self.apply_b_dec_to_input:
                self.shift_latents(self.W_enc_rows @ other.input_mean)
            self.b_dec.sub_(other.input_mean)
            self._transform(other.unwhitening, other.whitening)
            self._begin_whitening(other)
            return self
        if self.loss_reduction == "normalised":
            self.mean_baseline_mse.mul_(other.input_scale**2)
        self.scale_latents(other.input_scale)
        self.b_dec.mul_(other.input_scale)
        self.input_scale.copy_(other.input_scale)
        return self

    def _transform(self, forward: Tensor, backward: Tensor) -> None:
        """Let the weights take x where they took x · forward."""
        self.W_enc_rows.copy_(self.W_enc_rows @ forward.T)
        self.W_dec.copy_(self.W_dec @ backward)
        self.b_dec.copy_(self.b_dec @ backward)

    def _begin_whitening(self, other: "SAE") -> None:
        self.input_scaling, self.loss_reduction = other.input_scaling, other.loss_reduction
        self.options = {**self.options, "input_scaling": "whitening"}
        self.options["loss_reduction"] = self.loss_reduction
        for name in ("input_mean", "whitening", "unwhitening", "mean_baseline_mse"):
            if hasattr(other, name):
                self.register_buffer(name, getattr(other, name).clone())

    def _end_whitening(self) -> None:
        self.input_scaling = "none"
        self.options = {**self.options, "input_scaling": "none", "units": None}
        if self.loss_reduction == "normalised":  # It is of other units now.
            self.loss_reduction = "mean"
            self.options["loss_reduction"] = "mean"
            del self.mean_baseline_mse
        del self.input_mean, self.whitening, self.unwhitening

    def scale_latents(self, factor: Tensor) -> None:
        """Multiply pre-activations, and what they are compared with, by one factor or one each.

        The encoder's rows are left alone: the caller scales them, or what they read.
        """
        self.b_enc.mul_(factor)

    def shift_latents(self, by: Float[Tensor, " d_sae"]) -> None:
        """Add to what the encoder's rows give."""
        self.b_enc.add_(by)

    def move_norms(self) -> None:
        """Move decoder norms into the encoder, where that changes no choice of latents.

        Decoder rows have norm 1 afterwards; a row of zeros stays.
        """
        norms = self.W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        self.W_enc_rows.mul_(norms.unsqueeze(1))
        self.scale_latents(norms)
        self.W_dec.div_(norms.unsqueeze(1))

    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk: every weight, `W_enc` as [d_in, d_sae]."""
        state = {
            self.stored_names.get(name, name): tensor.detach()
            for name, tensor in self.state_dict().items()
        }
        if "W_enc_rows" in state:
            state["W_enc"] = state.pop("W_enc_rows").T.contiguous()
        return state

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take weights from disk.

        Raises:
            StoreError: a tensor is missing, surplus or of another shape.
        """
        own = self.tensors()
        for name in self.training_buffers:
            if name not in tensors:
                own.pop(name, None)
        if wrong := sorted(own.keys() ^ tensors.keys()):
            what = "lacks" if wrong[0] in own else "has a surplus"
            raise StoreError(f"checkpoint of type {self.kind!r} {what} tensor {wrong[0]!r}")
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape:
                found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
                raise StoreError(f"checkpoint: {name} has shape {found}, expected {wanted}")
        for name, tensor in self.state_dict().items():
            stored = "W_enc" if name == "W_enc_rows" else self.stored_names.get(name, name)
            if stored in own:
                tensor.copy_(tensors[stored].T if name == "W_enc_rows" else tensors[stored])

    def config(self) -> dict[str, Any]:
        """`type`, sizes and options: what `cfg.json` keeps and `SAES.build` takes."""
        return {**self.options, "type": self.kind, "d_sae": self.d_sae, "expansion": None}


UNITS: dict[str, tuple[str, ...]] = {
    "input_scaling": get_args(InputScaling),
    "loss_reduction": get_args(LossReduction),
}


def count_active(acts: Float[Tensor, "n d_sae"]) -> Int64[Tensor, " d_sae"]:
    """In how many rows each latent is active."""
    return acts.detach().count_nonzero(dim=0)


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
