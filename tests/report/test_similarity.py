import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import integrate, special
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_runner.config import config_dir, construct
from sae_runner.report.options import SimilarityOptions
from sae_runner.report.similarity import Directions, greedy, matching, nearest, similarity, unit


def options(**changes: Any) -> SimilarityOptions:
    block = yaml.safe_load((Path(config_dir()) / "report.yaml").read_text())["similarity"]
    made: SimilarityOptions = construct(
        SimilarityOptions.from_config, block | changes, where="similarity"
    )
    return made


def random(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def tied(decoder: Tensor) -> Directions:
    return Directions(decoder, decoder)


def test_the_fixture_of_mmcs_both_ways() -> None:
    dictionary = torch.eye(3)
    supervised = torch.tensor([[1.0, 0, 0], [0, 1, 1]])  # Not of norm 1: that is no matter.
    found = similarity(tied(supervised), tied(dictionary), options())
    assert found["mmcs_12"] == pytest.approx(0.853553, abs=1e-6)
    assert found["mmcs_21"] == pytest.approx(0.804738, abs=1e-6)


@pytest.mark.parametrize("exact_up_to", [1, 8192])
def test_a_permuted_dictionary_is_the_same_one(exact_up_to: int) -> None:
    decoder, encoder, order = random(50, 16), random(50, 16, 1), torch.randperm(50)
    one, two = Directions(decoder, encoder), Directions(3 * decoder[order], encoder[order])
    found = similarity(one, two, options(exact_up_to=exact_up_to))
    for name in ("mmcs_12", "mmcs_21", "pw_mcc", "shared_frac"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert found["frac_matched_12"] == {"0.5": 1, "0.7": 1, "0.8": 1, "0.9": 1}
    assert found["method"] == ("greedy" if exact_up_to == 1 else "hungarian")


def test_orthogonal_complements_have_nothing_in_common() -> None:
    basis = torch.linalg.qr(random(8, 8)).Q
    found = similarity(tied(basis[:4]), tied(basis[4:]), options())
    for name in ("mmcs_12", "mmcs_21", "pw_mcc", "shared_frac"):
        assert found[name] == pytest.approx(0, abs=1e-6), name


def test_an_opposite_direction_is_no_match() -> None:
    found = similarity(tied(torch.eye(2)), tied(-torch.eye(2)), options())
    assert found["mmcs_12"] == 0 and found["pw_mcc"] == 0 and found["n_shared"] == 0


def test_random_dictionaries_score_what_random_directions_do() -> None:
    n, d = 1024, 64
    found = similarity(tied(random(n, d)), tied(random(n, d, 1)), options(seed=2))
    # max of n cosines, each with (1 + cos) / 2 ~ Beta((d − 1) / 2, (d − 1) / 2).
    half = (d - 1) / 2
    expected = 1 - integrate.quad(lambda c: special.betainc(half, half, (1 + c) / 2) ** n, -1, 1)[0]
    for name in ("mmcs_12", "mmcs_21", "mmcs_random_12", "mmcs_random_21"):
        assert found[name] == pytest.approx(expected, abs=0.006), name
    assert expected < math.sqrt(2 * math.log(n) / d)  # The rule of thumb is an upper bound.
    assert similarity(tied(random(n, d)), tied(random(n, d, 1)), options(seed=2)) == found


def test_an_sae_that_began_at_the_baselines_seed_is_no_baseline() -> None:
    found = similarity(tied(random(256, 32, seed=0)), tied(random(256, 32, 1)), options(seed=0))
    assert found["mmcs_random_12"] < 0.6


def test_the_random_baseline_has_as_many_directions_as_the_other_side() -> None:
    found = similarity(tied(random(200, 16)), tied(random(2000, 16, 1)), options())
    assert found["mmcs_random_12"] > found["mmcs_random_21"] + 0.05


def test_shared_latents_are_paired_alike_by_decoder_and_encoder_and_close() -> None:
    eye = torch.eye(4)
    swapped = eye[[0, 1, 3, 2]]  # The encoder pairs 2 and 3 the other way round.
    found = similarity(tied(eye), Directions(eye, swapped), options())
    assert (found["n_shared"], found["shared_frac"], found["pw_mcc"]) == (2, 0.5, 1)
    far = torch.tensor([math.cos(1.0), math.sin(1.0)])
    tilted = torch.block_diag(far.unsqueeze(0), torch.eye(2))  # 0.54 from the first axis.
    one = tied(torch.eye(4)[[0, 2, 3]])
    for threshold, shared in ((0.7, 2), (0.5, 3)):
        found = similarity(one, tied(tilted), options(shared_cosine=threshold))
        assert found["n_shared"] == shared
    # The mean of both counts: a decoder row at cos 1 makes up for an encoder row at 0.54.
    assert similarity(one, Directions(one.decoder, tilted), options())["n_shared"] == 3


@pytest.mark.parametrize("exact_up_to", [1, 8192])
def test_a_part_of_a_dictionary_is_shared_in_full_with_the_whole_both_ways(
    exact_up_to: int,
) -> None:
    whole = tied(torch.eye(6))
    part = tied(torch.eye(6)[[4, 1]])
    for one, two in ((whole, part), (part, whole)):
        found = similarity(one, two, options(exact_up_to=exact_up_to))
        assert (found["n_shared"], found["shared_frac"], found["pw_mcc"]) == (2, 1, 1)


def test_exact_matching_is_scipys_of_the_cosines_and_greedy_takes_the_greatest_first() -> None:
    a, b = unit(random(60, 12)), unit(random(40, 12, 1))
    cosines = (a @ b.T).numpy()
    exact = matching(a, b, 60)
    rows, columns = linear_sum_assignment(-cosines.astype(float))
    assert exact.first.tolist() == rows.tolist() and exact.second.tolist() == columns.tolist()
    taken: dict[int, int] = {}
    for cell in np.argsort(-cosines, axis=None):
        row, column = divmod(int(cell), cosines.shape[1])
        if row not in taken and column not in taken.values():
            taken[row] = column
    found = matching(a, b, 59)
    assert found.method == "greedy"
    assert dict(zip(found.first.tolist(), found.second.tolist(), strict=True)) == taken
    assert found.cosine.sum() < exact.cosine.sum()


def test_equal_directions_do_not_keep_greedy_matching_from_ending() -> None:
    found = greedy(unit(torch.ones(70, 3)), unit(torch.ones(50, 3)))
    assert len(found.first) == 50 == len(set(found.second.tolist()))


def test_parts_of_a_product_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = unit(random(50, 8)), unit(random(30, 8, 1))
    whole = nearest(a, b)
    monkeypatch.setattr("sae_runner.report.similarity.ROWS", 7)
    for found, expected in zip(nearest(a, b), whole, strict=True):
        torch.testing.assert_close(found.cosine, expected.cosine)
        assert torch.equal(found.place, expected.place)
    cosines = a @ b.T
    assert torch.equal(whole[0].place, cosines.argmax(1))
    assert torch.equal(whole[1].place, cosines.argmax(0))


def test_a_dictionary_without_latents_gives_nulls() -> None:
    found = similarity(tied(torch.zeros(0, 4)), tied(torch.eye(4)), options())
    assert found["n_alive_1"] == 0 and found["n_alive_2"] == 4
    full = similarity(tied(torch.eye(4)), tied(torch.eye(4)), options())
    assert found.keys() == full.keys()
    assert all(v is None for k, v in found.items() if not k.startswith("n_alive"))
