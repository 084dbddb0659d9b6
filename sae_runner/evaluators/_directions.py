"""Cosines of many directions with each other, without ever holding them all."""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

CHUNK_BYTES = 2**26
ROWS_AT_ONCE = 4096


def unit_rows(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m d"], Int64[Tensor, " m"]]:
    """Rows of norm 1 in float32, and which rows they are: those that are not zero."""
    rows = rows.detach()
    # Some at a time: all of them in float64 would take more than what comes of them.
    norms = torch.cat([part.double().norm(dim=1) for part in torch.split(rows, ROWS_AT_ONCE)])
    kept = (norms > 0).nonzero().squeeze(1)
    units = rows.new_empty(len(kept), rows.shape[1], dtype=torch.float32)
    parts = (torch.split(tensor, ROWS_AT_ONCE) for tensor in (units, kept))
    for unit, which in zip(*parts, strict=True):
        unit.copy_(rows[which].double() / norms[which].unsqueeze(1))
    return units, kept


def max_cosines(unit: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Max over k ≠ j of u_j · u_k; at least two rows. Each pair is multiplied once."""
    best = unit.new_full((len(unit),), -torch.inf)
    step = max(1, CHUNK_BYTES // (4 * len(unit)))
    for start in range(0, len(unit), step):
        cosines = unit[start : start + step] @ unit[start:].T
        own = torch.arange(len(cosines), device=unit.device)
        cosines[own, own] = -torch.inf
        for found, of in ((cosines.amax(1), slice(start, start + step)),
                          (cosines.amax(0), slice(start, None))):  # fmt: skip
            best[of] = torch.maximum(best[of], found)
    return best


def mean_cosine_within(unit: Float[Tensor, "n d"]) -> float:
    """Mean of u_i · u_j over pairs i < j: (‖Σ u‖² − n) / (n (n − 1)); at least two rows."""
    n, total = len(unit), unit.double().sum(0)
    return float((total @ total - n) / (n * (n - 1)))


def mean_cosine_between(one: Float[Tensor, "n d"], other: Float[Tensor, "m d"]) -> float:
    """Mean of u · v over u of one and v of the other: Σu · Σv / (n m)."""
    return float(one.double().sum(0) @ other.double().sum(0) / (len(one) * len(other)))


def first_component_share(unit: Float[Tensor, "n d"]) -> float:
    """λ₁ / Σλ of the uncentred Gram matrix: 1 when all rows lie on one line."""
    n, d = unit.shape
    if n <= d:
        rows = unit.double()
        gram: Float64[Tensor, "m m"] = rows @ rows.T
    else:
        gram = torch.zeros(d, d, dtype=torch.float64, device=unit.device)
        for part in torch.split(unit, 4096):
            gram += part.double().T @ part.double()
    return float(torch.linalg.eigvalsh(gram)[-1] / n)
