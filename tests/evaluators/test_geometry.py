import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_runner.config import config_dir
from sae_runner.evaluators import EVALUATORS, _directions, geometry
from sae_runner.evaluators._directions import (
    first_component_share,
    max_cosines,
    mean_cosine_between,
    mean_cosine_within,
    unit_rows,
)

CFG = {"type": "geometry", "of": "all"}


def simplex(n):
    """n unit vectors of which any two have the cosine −1/(n−1)."""
    return torch.nn.functional.normalize(torch.eye(n) - 1 / n, dim=1)


def drawn(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def run(measure, W_dec, W_enc=None, *, of="all", fired=None, **more):
    fired = range(len(W_dec)) if fired is None else fired
    f = torch.zeros(6, len(W_dec))
    f[:, list(fired)] = 1.0
    x = torch.ones(6, W_dec.shape[1])
    return measure({**CFG, "of": of}, x, latents=f, W_dec=W_dec, W_enc=W_enc, **more)


def test_cosines_are_those_of_numpy_over_whole_matrices(measure, monkeypatch):
    monkeypatch.setattr(_directions, "CHUNK_BYTES", 4 * 50 * 7)
    for module in (_directions, geometry):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 8)
    W_dec, W_enc = drawn(50, 8), drawn(50, 8, 1)
    found = run(measure, W_dec, W_enc)
    wanted = {}
    dec, enc = (
        np.asarray(w.double() / w.double().norm(dim=1, keepdim=True)) for w in (W_dec, W_enc)
    )
    for name, unit in (("max_cos_dec", dec), ("max_cos_enc", enc)):
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -2)
        wanted[name] = cosines.max(1)
    wanted["enc_dec_cos"] = (dec * enc).sum(1)
    for name, values in wanted.items():
        np.testing.assert_allclose(found.per_latent[name], values, atol=1e-6)
        metrics = found.metrics["geometry"]
        assert metrics[f"{name}_mean"] == pytest.approx(values.mean(), abs=1e-6)
        assert metrics[f"{name}_median"] == pytest.approx(np.median(values), abs=1e-6)
        assert metrics[f"{name}_p95"] == pytest.approx(np.percentile(values, 95), abs=1e-6)


def test_orthonormal_duplicated_and_simplex_dictionaries(measure):
    assert run(measure, 3 * torch.eye(5)).metrics["geometry"]["max_cos_dec_mean"] == 0
    twice = torch.cat([drawn(4, 6), 2 * drawn(4, 6)])
    assert run(measure, twice).metrics["geometry"]["max_cos_dec_mean"] == pytest.approx(1, abs=1e-6)
    found = run(measure, simplex(5), -simplex(5)).metrics["geometry"]
    assert found["max_cos_dec_p95"] == pytest.approx(-1 / 4, abs=1e-6)
    assert found["max_cos_enc_median"] == pytest.approx(-1 / 4, abs=1e-6)
    assert found["enc_dec_cos_mean"] == pytest.approx(-1, abs=1e-6)


def test_latents_that_never_fired_are_left_out_unless_all_are_asked_for(measure):
    W = torch.cat([torch.eye(4), torch.eye(4)[:1]])  # Latent 4 repeats latent 0 and is dead.
    alive = run(measure, W, of="alive", fired=[0, 1, 2, 3])
    assert alive.metrics["geometry"]["n_latents"] == 4
    assert alive.metrics["geometry"]["max_cos_dec_mean"] == 0
    assert alive.per_latent["max_cos_dec"].mask.tolist() == [False] * 4 + [True]
    every = run(measure, W, of="all", fired=[0, 1, 2, 3])
    assert every.metrics["geometry"]["max_cos_dec_mean"] == pytest.approx(2 / 5)


def test_rows_without_a_direction_are_dropped_and_counted(measure):
    W_dec, W_enc = torch.eye(4), torch.eye(4)
    W_dec[0] = 0
    W_enc[2] = 0
    found = run(measure, W_dec, W_enc)
    metrics = found.metrics["geometry"]
    assert (metrics["n_zero_dec"], metrics["n_zero_enc"]) == (1, 1)
    assert metrics["enc_dec_cos_mean"] == 1
    assert found.per_latent["enc_dec_cos"].mask.tolist() == [True, False, True, False]
    assert found.per_latent["max_cos_dec"].mask.tolist() == [True, False, False, False]


def test_too_few_latents_and_other_spaces_are_nulls_with_notes(measure):
    found = run(measure, torch.eye(4), of="alive", fired=[2])
    assert found.metrics["geometry"]["max_cos_dec_mean"] is None
    assert found.metrics["geometry"]["enc_dec_cos_mean"] == 1
    none = run(measure, torch.eye(4), of="alive", fired=[])
    assert none.metrics["geometry"]["enc_dec_cos_p95"] is None
    across = run(measure, torch.eye(4), drawn(4, 7))
    assert across.metrics["geometry"]["enc_dec_cos_mean"] is None
    assert any("different spaces" in note.detail for note in across.notes)
    assert across.metrics["geometry"]["max_cos_enc_mean"] is not None


def test_means_over_pairs_are_exact():
    assert mean_cosine_within(simplex(7)) == pytest.approx(-1 / 6, abs=1e-6)
    assert mean_cosine_within(torch.eye(5)) == 0
    same = unit_rows(torch.ones(9, 3))[0]
    assert mean_cosine_within(same) == pytest.approx(1, abs=1e-6)
    one, other = unit_rows(drawn(30, 4))[0], unit_rows(drawn(20, 4, 1))[0]
    cosines = (one.double() @ one.double().T).numpy()
    assert mean_cosine_within(one) == pytest.approx(
        cosines[np.triu_indices(30, 1)].mean(), abs=1e-7
    )
    assert mean_cosine_between(one, other) == pytest.approx(
        float((one.double() @ other.double().T).mean()), abs=1e-7
    )


@pytest.mark.parametrize("n", [3, 40])  # Fewer rows than dimensions, and more.
def test_first_component_share_is_that_of_the_singular_values(n):
    unit = unit_rows(drawn(n, 8) + 1)[0]
    singular = torch.linalg.svdvals(unit.double())
    wanted = float(singular[0] ** 2 / (singular**2).sum())
    assert first_component_share(unit) == pytest.approx(wanted, rel=1e-6)
    assert first_component_share(unit_rows(torch.ones(n, 8))[0]) == pytest.approx(1, abs=1e-6)
    assert first_component_share(torch.eye(8)[:n]) == pytest.approx(1 / min(n, 8))


def test_max_cosines_in_chunks_of_any_size(monkeypatch):
    unit = unit_rows(drawn(23, 5))[0]
    whole = max_cosines(unit)
    for size in (1, 4 * 23 * 5, 10**9):
        monkeypatch.setattr(_directions, "CHUNK_BYTES", size)
        torch.testing.assert_close(max_cosines(unit), whole)


def test_the_yaml_has_every_option():
    cfg = OmegaConf.load(f"{config_dir()}/evaluators/geometry.yaml")["geometry"]
    assert EVALUATORS.build(cfg).of == "alive"
