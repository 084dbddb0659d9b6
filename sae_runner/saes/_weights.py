"""The weights of an SAE: shapes, the units they see activations in, and how they are stored."""

from collections.abc import Hashable
from typing import Any, ClassVar, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_runner.errors import ConfigError, DataError, StoreError, did_you_mean
from sae_runner.kernels.selection import Selector
from sae_runner.saes import _scaling
from sae_runner.saes._options import UNITS, Common, width
from sae_runner.statistics import ActivationStats


class Weights(nn.Module):
    """Encoder, decoder and biases of latents, which see scaled activations.

    What comes in is scaled, so that losses and learning rates see activations of a standard size;
    `fold` moves what is affine of that into the weights.

    Raises:
        ConfigError: options contradict each other, or coefficients are used in other units than
            those they were published for.
    """

    kind: ClassVar[str]
    """The `type:` it is registered under."""
    own_units: ClassVar[tuple[str, ...]] = ()
    """Words that `units` may hold besides scalings and reductions."""
    units_of_penalty: ClassVar[bool] = False
    """Whether `units` are those of the penalty's coefficient alone, which a target L0 finds."""
    stored_names: ClassVar[dict[str, str]] = {}
    """Names on disk of weights that are published under another name than the base's."""
    training_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers that a resume needs and use does not: a folded SAE is stored without them."""
    d_out: int
    """Width of what is reconstructed."""
    input_scale: Tensor
    """s; 1 where rows are normalised or whitened, and after `fold`."""
    mean_baseline_mse: Tensor
    """MSE of predicting the dataset's mean, in scaled units: what `normalised` divides by."""
    input_mean: Tensor
    whitening: Tensor
    unwhitening: Tensor

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
        self.selector = Selector()  # How a trainer wants encoders to choose.
        self._shared: tuple[_scaling.ScaledOnce, Hashable] | None = None
        self.make_weights()
        self.register_buffer("input_scale", torch.ones(()))
        if self.loss_reduction == "normalised":
            self.register_buffer("mean_baseline_mse", torch.ones(()))
        if self.input_scaling == "whitening":
            self.register_buffer("input_mean", torch.zeros(d_in))
            self.register_buffer("whitening", torch.eye(d_in))
            self.register_buffer("unwhitening", torch.eye(d_in))

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
        known = {word for words in UNITS.values() for word in words} | set(self.own_units)
        if unknown := [word for word in common["units"] or () if word not in known]:
            raise ConfigError(
                f"sae.units={unknown[0]}: no such unit.{did_you_mean(unknown[0], known)}"
            )
        if self.units_of_penalty and common["target_l0"] is not None:
            return
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

    def rows_by_latent(self) -> list[str]:
        """Names of the parameters of which a latent is a row."""
        rows = (name for name, p in self.named_parameters() if p.ndim and len(p) == self.d_sae)
        return [name for name in rows if name != "b_dec"]  # Which is as long where d_sae = d_in.

    # -- Units -----------------------------------------------------------------------------------

    def scaled(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """What the weights and the losses see of x, in the precision of the weights."""
        if self._shared is None:
            return self._scaled(x)
        once, scaling = self._shared
        return once.of(x, scaling, self._scaled)

    def share_scaling(self, once: _scaling.ScaledOnce) -> None:
        """Scale rows once with all that do it in the same way; how is settled by now."""
        names = ("input_scale", "input_mean", "whitening")
        how = [t.cpu().numpy().tobytes() for n, t in self.named_buffers() if n in names]
        self._shared = once, (self.input_scaling, self.b_dec.dtype, *how)

    def _scaled(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        x = x.to(self.b_dec.dtype)
        if self.input_scaling == "layer_norm":
            rows = _scaling.rows_of(x)
            return (x - rows.mean) / (rows.deviation + _scaling.EPSILON)
        if self.input_scaling == "whitening":
            with torch.autocast(x.device.type, enabled=False):  # Half precision would blur x.
                return (x - self.input_mean) @ self.whitening
        # Kernels read whole rows, and a transcoder's inputs are but a part of stored ones.
        return x.contiguous() if self.input_scaling == "none" else x * self.input_scale

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
        return x_hat if self.input_scaling == "none" else x_hat / self.input_scale

    def input_of(self, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n d_in"]:
        """What it encodes of a store's rows: all, but for a transcoder."""
        return rows

    def target_of(self, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n d_out"]:
        """What it reconstructs of a store's rows: all, but for a transcoder."""
        return rows

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

    # -- Storing ---------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self) -> "Weights":
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
    def unfold_like(self, other: "Weights") -> "Weights":
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

    def _begin_whitening(self, other: "Weights") -> None:
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
        """`type`, sizes and options: what `cfg.json` keeps and `SAES.build` takes.

        One form of each: a width is `d_sae`, and k, where there is one, is what L0 was asked for.
        """
        one_form = {"d_sae": self.d_sae, "expansion": None}
        if "k" in self.options:
            one_form["target_l0"] = None
        return {**self.options, "type": self.kind, **one_form}
