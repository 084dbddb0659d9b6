"""Numbers in and out of the evaluators: float64 to sum in, null and a note when undefined."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from sae_runner.evaluators.base import Note
from sae_runner.saes.base import Latents

NO_ROWS = "no row was evaluated"
# Numbers of one chunk in float64: 2 MB, which stays in a core's cache; a GPU wants larger ones.
CHUNK = {"cpu": 2**18, "cuda": 2**24}
NO_FINITE = "activations, latents or reconstructions are not all finite"


def float64_home(tensor: Tensor) -> Tensor:
    """The same tensor on a device that has float64 (Metal has none)."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def chunks(x: Float[Tensor, "n d"]) -> Sequence[Tensor]:
    """The rows in parts that are small enough to be fast in float64."""
    return torch.split(x, max(1, CHUNK.get(x.device.type, CHUNK["cpu"]) // x.shape[1]))


def row_norms(x: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """‖x_t‖₂ of each row, summed in float64, on the CPU."""
    parts = (part.double() for part in chunks(float64_home(x)))
    return torch.cat([torch.linalg.vecdot(part, part) for part in parts]).sqrt().cpu()


class Entries(NamedTuple):
    """The stored entries of latents, on the CPU."""

    latent: Int64[Tensor, " nnz"]
    size: Float64[Tensor, " nnz"]
    """|f|"""
    active: Bool[Tensor, " nnz"]
    """|f| > active_eps, and finite"""
    n_not_finite: int


def entries(latents: Latents, active_eps: float) -> Entries:
    """What the sparse latents hold, and which of it counts as active."""
    size = latents.values.detach().cpu().double().abs()
    active, n_not_finite = size > active_eps, 0
    if not math.isfinite(float(size.sum())):  # One sum is cheaper than a test of every entry.
        finite = size.isfinite()
        active, n_not_finite = active & finite, int((~finite).sum())
    return Entries(latents.indices.cpu().long(), size, active, n_not_finite)


class Scalars:
    """The metrics of one category; what cannot be computed becomes null and gets a note."""

    def __init__(self, category: str) -> None:
        self.category = category
        self.values: dict[str, float | int | None] = {}
        self.notes: list[Note] = []

    def put(self, name: str, value: float | int) -> float | int | None:
        """Keep a value; one that is not finite becomes null."""
        if math.isfinite(value):
            self.values[name] = value
        else:
            self.null(name, "not_applicable", NO_FINITE)
        return self.values[name]

    def ratio(
        self, name: str, numerator: float | Tensor, denominator: float | Tensor, detail: str
    ) -> float | None:
        """Keep numerator / denominator; where the denominator is 0, null, with `detail` as note."""
        above, below = float(numerator), float(denominator)
        if below == 0:
            self.null(name, "zero_denominator", detail)
        else:
            self.put(name, above / below)
        return self.values[name]

    def null(self, name: str, code: str, detail: str) -> None:
        """Keep null, and why."""
        self.values[name] = None
        self.note(name, code, detail)

    def note(self, name: str, code: str, detail: str) -> None:
        """Say how `name` is to be read."""
        self.notes.append(Note(code, f"{self.category}.{name}", detail))


def plain_list(values: Any) -> list[Any]:
    """A tensor, array or sequence as Python numbers, with None for what is not finite."""
    items: Sequence[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in items]
