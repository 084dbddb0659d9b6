import numpy as np
import pytest
import torch

from sae_runner.config import config_dir
from sae_runner.data import build_dataset
from sae_runner.data.toy import ToyDataset, mix, normals, poisson, uniform
from sae_runner.errors import ConfigError

OPTIONS = {
    "n_features": 48, "d": 24, "n_active": 4.0, "zipf": 0.0, "magnitude": "uniform",
    "correlation": 0.0, "noise_std": 0.0, "bias_norm": 0.0, "n_examples": 40_000, "heldout": 0.1,
    "seed": 0,
}  # fmt: skip
IDS = np.arange(20_000)


def toy(**changes: object) -> ToyDataset:
    dataset = build_dataset({"type": "toy", **OPTIONS, **changes})
    assert isinstance(dataset, ToyDataset)
    return dataset


def test_the_yaml_names_every_option() -> None:
    from omegaconf import OmegaConf

    dataset = build_dataset(OmegaConf.load(f"{config_dir()}/dataset/toy.yaml"))
    assert dataset.name == "toy" and dataset.modality == "rows"


def test_rows_are_codes_times_dictionary_plus_bias() -> None:
    dataset = toy(bias_norm=3.0, magnitude="exponential")
    torch.testing.assert_close(dataset.dictionary.norm(dim=1), torch.ones(48))
    assert dataset.bias.norm().item() == pytest.approx(3.0, rel=1e-6)
    expected = dataset.codes(IDS[:500]).double() @ dataset.dictionary.double() + dataset.bias
    torch.testing.assert_close(dataset.rows(IDS[:500]).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_row_is_the_same_bits_in_any_company() -> None:
    dataset = toy(noise_std=0.1, bias_norm=1.0, correlation=0.5, zipf=1.0)
    together = dataset.rows(IDS[:300])
    for ids in ([17], [299, 17, 0], list(range(299, -1, -1))):
        assert torch.equal(dataset.rows(ids), together[ids])
        assert torch.equal(dataset.codes(ids), dataset.codes(IDS[:300])[ids])
    examples = dataset.load([5, 3])
    assert [example.id for example in examples] == [5, 3]
    assert examples[0].value.dtype == np.float32
    assert torch.equal(torch.from_numpy(examples[1].value), together[3])
    assert torch.equal(toy(noise_std=0.1, bias_norm=1.0, correlation=0.5, zipf=1.0).rows([17])[0],
                       together[17])  # fmt: skip


def test_known_row_stays_what_it_is() -> None:
    """A change that alters rows must raise the version in the fingerprint."""
    active = toy(magnitude="constant").active([0, 1, 2])
    assert active.rows.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert active.features.tolist() == [
        27,
        29,
        33,
        44,
        45,
        46,
        3,
        7,
        13,
        22,
        23,
        27,
        38,
        43,
        16,
        17,
        29,
        41,
    ]


@pytest.mark.parametrize("zipf", [0.0, 1.2])
def test_features_fire_as_often_as_they_should_and_independently(zipf: float) -> None:
    dataset = toy(zipf=zipf)
    active = (dataset.codes(IDS) > 0).double()
    p = torch.from_numpy(dataset.probabilities)
    assert p.sum().item() == pytest.approx(4.0)
    assert p[0].item() == pytest.approx(p[1].item())
    assert p[2] / p[0] == pytest.approx(2.0**-zipf)
    z = (active.mean(0) - p) / (p * (1 - p) / len(IDS)).sqrt()
    assert z.abs().max() < 4.5 and 0.7 < z.std() < 1.3
    correlations = torch.corrcoef(active.T)[~torch.eye(48, dtype=torch.bool)]
    assert correlations.abs().max() < 5 / len(IDS) ** 0.5


def test_pairs_fire_together_with_the_given_correlation() -> None:
    dataset = toy(correlation=0.6)
    active = (dataset.codes(IDS) > 0).double()
    phi = torch.corrcoef(active.T)
    even = torch.arange(0, 48, 2)
    assert phi[even, even + 1].mean().item() == pytest.approx(0.6, abs=0.01)
    assert phi[even, even + 1].std() < 0.03
    assert phi[even[:-1] + 1, even[1:]].abs().max() < 0.04
    torch.testing.assert_close(
        active.mean(0), torch.from_numpy(dataset.probabilities), atol=0.01, rtol=0
    )


@pytest.mark.parametrize(
    ("magnitude", "std"),
    [("constant", 0.0), ("uniform", 12**-0.5), ("half_normal", (np.pi / 2 - 1) ** 0.5),
     ("exponential", 1.0)],
)  # fmt: skip
def test_codes_have_mean_one_and_the_distribution_s_spread(magnitude: str, std: float) -> None:
    codes = toy(magnitude=magnitude).codes(IDS)
    values = codes[codes > 0].double()
    assert values.mean().item() == pytest.approx(1.0, abs=0.015)
    assert values.std().item() == pytest.approx(std, abs=0.02)


def test_noise_has_its_standard_deviation_and_no_correlation() -> None:
    noise = (toy(noise_std=0.5).rows(IDS) - toy().rows(IDS)).double()
    assert noise.std().item() == pytest.approx(0.5, rel=0.01)
    assert abs(noise.mean().item()) < 4 * 0.5 / noise.numel() ** 0.5
    assert torch.corrcoef(noise.T)[~torch.eye(24, dtype=torch.bool)].abs().max() < 0.04
    assert ((noise / 0.5) ** 4).mean().item() == pytest.approx(3.0, abs=0.1)  # Gaussian kurtosis.


def test_splits_cover_everything_once() -> None:
    dataset = toy()
    train, heldout = dataset.ids("train"), dataset.ids("heldout")
    assert len(heldout) == 4000
    assert np.array_equal(np.union1d(train, heldout), np.arange(40_000))
    assert not np.intersect1d(train, heldout).size


@pytest.mark.parametrize("change", [{"seed": 1}, {"zipf": 0.5}, {"noise_std": 0.1}, {"d": 25}])
def test_what_changes_rows_changes_the_fingerprint(change: dict[str, float]) -> None:
    assert toy(**change).fingerprint() != toy().fingerprint() == toy().fingerprint()


def test_seeds_give_other_dictionaries_and_rows() -> None:
    one, two = toy(seed=1), toy(seed=2)
    assert (one.dictionary * two.dictionary).sum(1).abs().mean() < 0.4
    assert not torch.equal(one.codes(IDS[:10]) > 0, two.codes(IDS[:10]) > 0)


def test_too_many_active_features_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^dataset\.n_active=60: at most 47\.52 for [^\n]*$"):
        toy(n_active=60.0)
    with pytest.raises(ConfigError, match=r"dataset\.zipf=2"):
        toy(n_active=10.0, zipf=2.0)
    with pytest.raises(ConfigError, match=r"dataset\.n_activ.*Did you mean 'n_active'"):
        build_dataset({"type": "toy", **OPTIONS, "n_activ": 1})


def test_mix_is_splitmix64() -> None:
    # First outputs of SplitMix64 seeded with 1234567, as published with the generator.
    state = np.array([1234567], dtype=np.uint64)
    golden = np.uint64(0x9E3779B97F4A7C15)
    assert mix(state)[0] == 6457827717110365317
    assert mix(state + golden)[0] == 3203168211198807973


def test_words_become_uniform_normal_and_poisson() -> None:
    bits = mix(np.arange(200_000, dtype=np.uint64))
    u = uniform(bits)
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(np.histogram(u, 20, (0, 1))[0] / 10_000 - 1).max() < 0.05
    for z in normals(bits):
        assert np.isfinite(z).all()
        assert z.mean() == pytest.approx(0, abs=0.01) and z.std() == pytest.approx(1, abs=0.01)
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert np.isfinite(normals(extremes)).all()
    for mean in (0.3, 6.0, 200.0):
        counts = poisson(u, mean)
        assert counts.mean() == pytest.approx(mean, rel=0.01)
        assert counts.var() == pytest.approx(mean, rel=0.02)
