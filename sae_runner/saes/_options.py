"""Options that every architecture has, and what follows from them alone."""

from typing import Literal, TypedDict, get_args

from sae_runner.config import Positive, PositiveFloat
from sae_runner.errors import ConfigError
from sae_runner.saes._scaling import InputScaling

LossReduction = Literal["sum", "mean", "normalised", "row_norm"]

UNITS: dict[str, tuple[str, ...]] = {
    "input_scaling": get_args(InputScaling),
    "loss_reduction": get_args(LossReduction),
}


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


MOST_LATENTS = 2**31 - 1
"""Indices of latents are 32 bits on disk."""


def width(d_in: int, d_sae: int | None, expansion: float | None) -> int:
    """The number of latents from exactly one of `d_sae` and `expansion`.

    Raises:
        ConfigError: both or neither are given, or that is too wide.
    """
    if (d_sae is None) == (expansion is None):
        given = "both" if d_sae is not None else "neither"
        raise ConfigError(
            f"sae.d_sae={_text(d_sae)} and sae.expansion={_text(expansion)}: {given} given; "
            "exactly one is needed, set the other to null"
        )
    found = d_sae if d_sae is not None else max(1, round(d_in * float(expansion or 0)))
    if found > MOST_LATENTS:
        given = f"sae.d_sae={found:.4g}" if d_sae is not None else f"sae.expansion={expansion:g}"
        raise ConfigError(f"{given}: more than {MOST_LATENTS:,} latents")
    return found


def _text(value: float | None) -> str:
    return "null" if value is None else f"{value:.12g}"
