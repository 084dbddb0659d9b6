from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from sae_runner.report.attribution import Attributions, attribution
from sae_runner.report.firing import max_correlations


def made(
    acts: Any, ids: Any = None, place: Any = None, token: Any = None, neurons: Any = None
) -> Attributions:
    """Of rows of four an example."""
    n = len(acts)
    ids = np.arange(n) // 4 if ids is None else ids
    place = np.arange(n) % 4 if place is None else place
    token = np.arange(n) % 7 if token is None else token
    return Attributions(ids, place, token, csr_array(np.asarray(acts, np.float64)), neurons)


def sparse(n: int, d_sae: int, seed: int = 0) -> Any:
    """Of either sign."""
    generator = np.random.default_rng(seed)
    return (generator.random((n, d_sae)) < 0.3) * generator.standard_normal((n, d_sae))


def test_maxima_are_numpys_over_the_rows_with_one_next_token() -> None:
    n = 240
    acts, noise, generator = sparse(n, 6), sparse(n, 5, 1), np.random.default_rng(3)
    other = np.concatenate([acts[:, :3] + 0.5 * noise[:, :3], noise], axis=1)
    other[:, 7] = 0
    order = generator.permutation(n)[:200]  # Some rows are missing, and no order is kept.
    token = np.arange(n) % 7
    token[order[:30]] += 1
    one, two = made(acts), made(other[order], order // 4, order % 4, token[order])
    found, why = attribution(one, two, neurons=False, seed=0)
    assert why == "" and (found["n_common"], found["n_units"]) == (200, 170)
    assert found["n_other_token"] == 30 and found["unit"] == "row"
    rows = np.sort(order[30:])
    with np.errstate(invalid="ignore"):
        rho = np.corrcoef(acts[rows].T, other[rows].T)[:6, 6:]
    assert found["max_corr_mean_12"] == pytest.approx(np.nanmax(rho, 1).mean(), abs=1e-6)
    best = np.nanmax(np.delete(rho, 7, 1), 0)
    assert found["max_corr_median_21"] == pytest.approx(np.median(best), abs=1e-6)
    assert found["frac_above_half_12"] == (np.nanmax(rho, 1) > 0.5).mean() == 0.5
    assert (found["n_constant_1"], found["n_constant_2"]) == (0, 1)
    assert found["max_corr_mean_shuffled_12"] < 0.3 < found["max_corr_mean_12"]


def test_neurons_are_those_of_the_same_rows() -> None:
    n, generator = 240, np.random.default_rng(3)
    acts, x = sparse(n, 4), generator.standard_normal((n, 3)).astype(np.float16)
    y = np.stack([x[:, 2], -x[:, 0], x[:, 1] + generator.standard_normal(n)], 1).astype(np.float16)
    order = generator.permutation(n)[:200]
    token = np.arange(n) % 7
    token[order[:30]] += 1
    one = made(acts, neurons=x)
    two = made(acts[order], order // 4, order % 4, token[order], y[order])
    found, why = attribution(one, two, neurons=True, seed=0)
    rows = np.sort(order[30:])
    rho = np.corrcoef(x[rows].astype(float).T, y[rows].astype(float).T)[:3, 3:]
    assert why == "" and found["n_units"] == 170
    assert found["max_corr_mean_neurons_12"] == pytest.approx(rho.max(1).mean(), abs=1e-6)
    assert found["max_corr_mean_neurons_21"] == pytest.approx(rho.max(0).mean(), abs=1e-6)
    assert rho.max(1) == pytest.approx([0.1, 0.7, 1], abs=0.15)
    assert found["max_corr_mean_neurons_shuffled_12"] < 0.25
    latents = {k: v for k, v in found.items() if "neurons" not in k}
    assert attribution(one, two, neurons=False, seed=0) == (latents, "")
    of_constants, why = attribution(one, two._replace(neurons=0 * y), neurons=True, seed=0)
    assert why == "" and of_constants["max_corr_mean_neurons_12"] is None
    assert of_constants["n_constant_neurons_2"] == 3 and latents.items() <= of_constants.items()
    without, why = attribution(one, two._replace(neurons=None), neurons=True, seed=0)
    assert without == latents | dict.fromkeys(found.keys() - latents) and why == ""


def test_a_sign_is_not_looked_past() -> None:
    acts = sparse(200, 4)
    found, _ = attribution(made(acts), made(-acts), neurons=False, seed=0)
    assert found["max_corr_mean_12"] < 0.3
    assert max_correlations(csr_array(acts), csr_array(acts))[0] == pytest.approx(1)


def test_where_tokens_differ_nothing_is_said() -> None:
    acts, n = sparse(80, 4), 80
    token = np.arange(n) % 7
    token[: n // 2 + 1] += 7
    found, why = attribution(made(acts), made(acts, token=token), neurons=False, seed=0)
    assert why.startswith("the next token is the same at 39 of 80 common rows: their tokenizers")
    assert found["max_corr_mean_12"] is None and found["n_units"] == 0
    token[n // 2] -= 7
    found, why = attribution(made(acts), made(acts, token=token), neurons=False, seed=0)
    assert why == "" and found["n_units"] == 40


def test_without_common_rows_or_latents_nothing_is_said() -> None:
    acts = sparse(80, 4)
    found, why = attribution(made(acts), made(acts, np.arange(80) + 500), neurons=False, seed=0)
    assert why == "they have no row in common" and found["max_corr_mean_21"] is None
    found, why = attribution(made(acts), made(0 * acts), neurons=False, seed=0)
    assert why == "no latent varies over the 80 rows" and found["n_constant_2"] == 4
