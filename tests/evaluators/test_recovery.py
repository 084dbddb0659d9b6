from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_runner.config import preset
from sae_runner.data import build_dataset
from sae_runner.data.toy import ToyDataset
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators.base import EvalContext, Findings, Rows
from sae_runner.saes.base import SAE, ActivationStats, Common, Latents, Loss, TrainState

N = 4000


class Given(SAE):
    """An SAE of given decoder; its latents are given too."""

    kind = "given"

    def __init__(self, W_dec: Tensor) -> None:
        common = {k: v for k, v in preset("sae", "topk").items() if k in Common.__annotations__}
        common |= {"d_sae": len(W_dec), "expansion": None, "input_scaling": "none"}
        super().__init__(W_dec.shape[1], options={}, **common)
        self.W_dec.data = W_dec.clone()

    def encode(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, x: Tensor, state: TrainState) -> Loss:
        raise NotImplementedError

    def initialise(self, stats: ActivationStats, generator: torch.Generator) -> None:
        raise NotImplementedError


def toy(**changes: Any) -> ToyDataset:
    options = {
        "n_features": 40, "d": 32, "n_active": 3.0, "zipf": 0.0, "magnitude": "uniform",
        "correlation": 0.0, "noise_std": 0.0, "bias_norm": 0.0, "n_examples": 20_000,
        "heldout": 0.2, "seed": 3,
    }  # fmt: skip
    dataset = build_dataset({"type": "toy", **options, **changes})
    assert isinstance(dataset, ToyDataset)
    return dataset


def measure(
    dataset: ToyDataset, W_dec: Tensor, latents: Tensor, splits: tuple[int, ...] = (0, 1500, N)
) -> Findings:
    """Findings for dense `latents` of the first N held-out rows, fed in batches."""
    ids = dataset.ids("heldout")[:N]
    evaluator = EVALUATORS.build({"type": "recovery", "hungarian": True})
    evaluator.start(EvalContext(Given(W_dec), N, ids, 0, dataset=lambda: dataset))
    for start, stop in pairwise(splits):
        part = torch.from_numpy(ids[start:stop])
        x = dataset.rows(ids[start:stop])
        sparse = Latents.from_dense(latents[start:stop])
        evaluator.update(Rows(x, sparse, x, part, torch.zeros_like(part), None))
    found: Findings = evaluator.finish()
    return found


@pytest.fixture(scope="module")
def dataset() -> ToyDataset:
    return toy()


@pytest.fixture(scope="module")
def codes(dataset: ToyDataset) -> Tensor:
    return dataset.codes(dataset.ids("heldout")[:N])


PERFECT = ("mmcs_true_to_sae", "mmcs_sae_to_true", "fraction_recovered", "hungarian_cosine",
           "f1_firing", "precision_firing", "recall_firing")  # fmt: skip


def test_the_truth_scores_one_whatever_its_norms_and_order(
    dataset: ToyDataset, codes: Tensor
) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    W_dec = dataset.dictionary[order] * torch.linspace(0.1, 5, 40).unsqueeze(1)
    found = measure(dataset, W_dec, codes[:, order])
    for name in PERFECT:
        assert found.metrics["recovery"][name] == pytest.approx(1.0, abs=1e-6), name
    assert found.metrics["recovery"]["n_alive_latents"] == 40
    assert found.per_latent["recovery_feature"].tolist() == order.tolist()
    assert not found.notes


def test_order_of_latents_and_batches_change_nothing(dataset: ToyDataset, codes: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(70, 32, generator=generator)
    latents = torch.relu(torch.randn(N, 70, generator=generator) - 1)
    order = torch.randperm(70, generator=generator)
    one = measure(dataset, W_dec, latents)
    two = measure(dataset, W_dec[order], latents[:, order], (0, 7, 7, 3000, N))
    assert one.metrics["recovery"] == pytest.approx(two.metrics["recovery"])


def test_counts_agree_with_the_definition(dataset: ToyDataset, codes: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    W_dec = torch.randn(60, 32, generator=generator)
    latents = torch.relu(torch.randn(N, 60, generator=generator) - 1.5)
    latents[:, 10:20] = 0  # Dead: may be nobody's nearest.
    found = measure(dataset, W_dec, latents)
    alive = [i for i in range(60) if not 10 <= i < 20]
    directions = W_dec.numpy() / np.linalg.norm(W_dec.numpy(), axis=1, keepdims=True)
    cosines = dataset.dictionary.numpy() @ directions.T
    f1 = []
    for feature in range(40):
        latent = max(alive, key=lambda i: cosines[feature, i])
        true, fired = codes[:, feature].numpy() > 0, latents[:, latent].numpy() > 0
        precision, recall = (true & fired).sum() / fired.sum(), (true & fired).sum() / true.sum()
        f1.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    metrics = found.metrics["recovery"]
    assert metrics["f1_firing"] == pytest.approx(np.mean(f1))
    assert found.series["recovery_f1"] == pytest.approx(f1)
    assert metrics["mmcs_true_to_sae"] == pytest.approx(cosines[:, alive].max(1).mean())
    assert metrics["mmcs_sae_to_true"] == pytest.approx(cosines[:, alive].max(0).mean())
    assert metrics["n_alive_latents"] == 50
    nearest = cosines.argmax(0)
    assert found.per_latent["recovery_feature"].tolist() == nearest.tolist()
    true, fired = codes[:, nearest[3]].numpy() > 0, latents[:, 3].numpy() > 0
    expected = 2 * (true & fired).sum() / (true.sum() + fired.sum())
    assert found.per_latent["recovery_f1"][3] == pytest.approx(expected)


def test_known_small_angles_both_ways() -> None:
    """True axes e1…e3 against (1,0,0) and (0,1,1)/√2: .8047 one way, .8536 the other."""
    dataset = toy(n_features=3, d=3, n_active=1.0)
    dataset.dictionary = torch.eye(3)
    W_dec = torch.tensor([[2.0, 0, 0], [0, 1.0, 1.0]])
    metrics = measure(dataset, W_dec, torch.ones(N, 2)).metrics["recovery"]
    assert metrics["mmcs_true_to_sae"] == pytest.approx((1 + 2 * 0.5**0.5) / 3)
    assert metrics["mmcs_sae_to_true"] == pytest.approx((1 + 0.5**0.5) / 2)
    assert metrics["fraction_recovered"] == pytest.approx(1 / 3)
    assert metrics["hungarian_cosine"] == pytest.approx((1 + 0.5**0.5) / 3)
    assert metrics["recall_firing"] == 1.0


def test_a_random_dictionary_scores_chance() -> None:
    """E max of F cosines in d dimensions: their density is ∝ (1 − c²)^((d − 3) / 2)."""
    dataset = toy(n_features=400)
    generator = torch.Generator().manual_seed(4)
    W_dec = torch.randn(200, 32, generator=generator)
    metrics = measure(dataset, W_dec, torch.ones(N, 200)).metrics["recovery"]
    c = np.linspace(-1, 1, 20_001)
    below = np.cumsum((1 - c**2) ** (29 / 2))
    below /= below[-1]
    expected = 1 - (below**200).sum() * (c[1] - c[0])
    assert metrics["mmcs_true_to_sae"] == pytest.approx(expected, abs=0.01)
    assert metrics["mmcs_true_to_sae_random"] == pytest.approx(expected, abs=0.01)
    assert metrics["fraction_recovered"] == 0.0


def test_one_broken_latent_costs_one_feature(dataset: ToyDataset, codes: Tensor) -> None:
    W_dec, latents = dataset.dictionary.clone(), codes.clone()
    W_dec[5] *= -1
    broken = measure(dataset, W_dec, latents).metrics["recovery"]
    assert broken["fraction_recovered"] == pytest.approx(39 / 40)
    assert broken["f1_firing"] < 39 / 40 + 0.02
    W_dec[5] *= -1
    latents[:, 5] = 0.0
    dead = measure(dataset, W_dec, latents).metrics["recovery"]
    assert dead["fraction_recovered"] == pytest.approx(39 / 40)
    assert dead["n_alive_latents"] == 39
    latents[: N // 2, 5] = codes[: N // 2, 5]
    half = measure(dataset, W_dec, latents).metrics["recovery"]
    share = (codes[: N // 2, 5] > 0).sum() / (codes[:, 5] > 0).sum()
    assert half["recall_firing"] == pytest.approx((39 + share.item()) / 40)
    assert half["precision_firing"] == pytest.approx(1.0)


def test_no_latent_fires() -> None:
    dataset = toy()
    found = measure(dataset, dataset.dictionary, torch.zeros(N, 40))
    for name in PERFECT:
        assert found.metrics["recovery"][name] is None
        assert f"recovery.{name}" in {note.metric for note in found.notes}


def test_a_feature_that_never_comes_is_left_out_and_said() -> None:
    dataset = toy(zipf=4.0, n_active=0.5)
    codes = dataset.codes(dataset.ids("heldout")[:N])
    latents = codes.clone()
    latents[0] = 1.0  # Every latent lives.
    found = measure(dataset, dataset.dictionary, latents)
    assert found.metrics["recovery"]["n_true_features_seen"] < 40
    assert None in found.series["recovery_f1"]
    assert {note.code for note in found.notes} == {"dead_feature"}
    assert found.metrics["recovery"]["recall_firing"] == pytest.approx(1.0)


def test_a_dataset_without_truth_is_refused_in_one_line(dataset: ToyDataset) -> None:
    class Pictures:
        name = "pictures"

    evaluator = EVALUATORS.build({"type": "recovery", "hungarian": False})
    sae = Given(torch.randn(4, 32))
    for get in (None, lambda: Pictures()):
        context = EvalContext(sae, 1, np.arange(1), 0, dataset=get)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"^evaluators\.recovery: not applicable[^\n]*$"):
            evaluator.start(context)
    narrow = EvalContext(Given(torch.randn(4, 8)), 1, np.arange(1), 0, dataset=lambda: dataset)
    with pytest.raises(ConfigError, match="has 32 dimensions, the SAE reads 8"):
        evaluator.start(narrow)
