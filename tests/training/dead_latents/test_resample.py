"""Resampling: which rows are drawn, what becomes of the latents, and of what Adam remembers."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats as distributions

from sae_runner.errors import ConfigError
from sae_runner.saes.base import TrainState
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.resample import Resample, draw_rows

D_IN, D_SAE = 8, 24
DEAD = [1, 4, 5, 9, 11]
OPTIONS = {"at": [0.25, 0.5], "n_rows": 1_000, "encoder_norm": 0.2, "lr_warmup": 0.1}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def trained(make, rows):
    """An SAE after three steps of Adam, with some latents dead."""

    def build(kind="relu", d_in=D_IN, d_sae=D_SAE, **options):
        sae, x = make(kind, d_in, d_sae, l1_coefficient=0.5), rows(200, d_in)
        optimiser = torch.optim.Adam(sae.parameters(), lr=1e-3)
        for _ in range(3):
            optimiser.zero_grad()
            sae.loss(x, TrainState()).total.backward()
            optimiser.step()
            sae.after_step()
        strategy = Resample(sae, 10, **{**OPTIONS, **options})
        strategy.rows_since_fired[DEAD] = 10
        strategy.rows_since_fired[0] = 9
        return sae, optimiser, strategy, x

    return build


def squared_errors(sae, x: torch.Tensor) -> np.ndarray:
    """By definition, in scaled units."""
    p = {name: tensor.double().numpy() for name, tensor in sae.tensors().items()}
    scaled = x.double().numpy() * sae.input_scale.item()
    f = np.maximum(scaled @ p["W_enc"] + p["b_enc"], 0)
    return ((f @ p["W_dec"] + p["b_dec"] - scaled) ** 2).sum(1)


# -- Which rows ----------------------------------------------------------------------------------


def test_the_odds_of_a_row_are_in_proportion_to_its_squared_loss(trained, rows):
    sae, *_ = trained()
    x, n_draws = rows(6, seed=5), 2_000
    loss, scaled = squared_errors(sae, x), sae.scaled(x)
    counts = np.zeros(6)
    for seed in range(n_draws):
        (drawn,) = draw_rows(sae, iter([x[:4], x[4:]]), 1, 6, generator(seed))
        counts[(scaled == drawn).all(1).nonzero().item()] += 1
    odds = loss**2 / (loss**2).sum()
    assert odds.max() > 3 * odds.min()
    assert distributions.chisquare(counts, n_draws * odds).pvalue > 1e-3
    plain = loss / loss.sum()  # The test is sharp enough to tell it from the loss itself.
    assert distributions.chisquare(counts, n_draws * plain).pvalue < 1e-6


def test_the_second_row_is_drawn_from_what_is_left(trained, rows):
    sae, *_ = trained()
    x, n_draws = rows(4, seed=6), 2_000
    weight, scaled = squared_errors(sae, x) ** 2, sae.scaled(x)
    pairs = list(itertools.permutations(range(4), 2))
    counts = dict.fromkeys(pairs, 0)
    for seed in range(n_draws):
        drawn = draw_rows(sae, iter([x]), 2, 4, generator(seed))
        counts[tuple((scaled == row).all(1).nonzero().item() for row in drawn)] += 1
    odds = [weight[a] / weight.sum() * weight[b] / (weight.sum() - weight[a]) for a, b in pairs]
    expected = n_draws * np.array(odds)
    assert distributions.chisquare(list(counts.values()), expected).pvalue > 1e-3


def test_no_row_beyond_the_asked_for_is_looked_at_and_none_comes_twice(trained, rows):
    sae, *_ = trained()
    x, seen = rows(40, seed=5), []

    def batches():
        for part in torch.split(x, 8):
            seen.append(len(part))
            yield part

    drawn = draw_rows(sae, batches(), 20, 20, generator())
    assert seen == [8, 8, 8]
    assert {tuple(r) for r in drawn.tolist()} == {tuple(r) for r in sae.scaled(x[:20]).tolist()}
    assert len(draw_rows(sae, iter([x[:3]]), 20, 100, generator())) == 3


# -- What becomes of the latents -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu", "topk", "jump_relu"])
def test_dead_latents_are_pointed_at_rows_and_others_stay(trained, kind):
    sae, optimiser, strategy, x = trained(kind)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    living = [i for i in range(D_SAE) if i not in DEAD]
    strategy.intervene(iter([x[:100], x[100:]]), optimiser, generator())
    after = dict(sae.named_parameters())
    for name, values in before.items():
        same = slice(None) if name == "b_dec" else living
        assert torch.equal(after[name][same], values[same]), name
    target = sae.scaled(x) - (sae.b_dec if sae.apply_b_dec_to_input else 0)
    target = (target / target.norm(dim=1, keepdim=True)).detach()
    length = 1.0 if sae.decoder_norm == "unit" else before["W_dec"].norm(dim=1).mean()
    decoder, encoder = sae.W_dec[DEAD].detach(), sae.W_enc_rows[DEAD].detach()
    nearest = (target @ decoder.T / length).max(0)
    torch.testing.assert_close(nearest.values, torch.ones(len(DEAD)))
    assert len(set(nearest.indices.tolist())) == len(DEAD)
    torch.testing.assert_close(decoder.norm(dim=1), length * torch.ones(len(DEAD)))
    norm = 0.2 * before["W_enc_rows"][living].norm(dim=1).mean()
    torch.testing.assert_close(encoder, norm * decoder / length)
    assert not sae.b_enc[DEAD].any()
    if kind == "jump_relu":
        assert torch.equal(sae.threshold[DEAD], torch.full((len(DEAD),), 0.001))


def test_where_encoder_and_decoder_are_one_matrix_rows_end_at_norm_one(trained):
    sae, optimiser, strategy, x = trained("matching_pursuit")
    before = sae.W_dec.detach().clone()
    strategy.intervene(iter([x]), optimiser, generator())
    sae.after_step()  # As the trainer does.
    target = torch.nn.functional.normalize(sae.scaled(x) - sae.b_dec, dim=1).detach()
    nearest = (target @ sae.W_dec[DEAD].detach().T).max(0).values
    torch.testing.assert_close(nearest, torch.ones(len(DEAD)))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert (before[DEAD] - sae.W_dec[DEAD]).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("d_in", [D_IN, D_SAE])
@pytest.mark.parametrize("kind", ["relu", "topk", "jump_relu", "gated"])
def test_adam_forgets_exactly_the_dead_rows(trained, kind, d_in):
    """A library writes through a chained index: nothing happens; b_dec may be as long as d_sae."""
    sae, optimiser, strategy, x = trained(kind, d_in)
    with torch.no_grad():
        for slots in optimiser.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                slots[name].add_(1.0)  # Nothing is zero by chance.
    before = {
        name: {slot: value.clone() for slot, value in optimiser.state[p].items()}
        for name, p in sae.named_parameters()
        if p in optimiser.state
    }
    strategy.intervene(iter([x]), optimiser, generator())
    living = [i for i in range(D_SAE) if i not in DEAD]
    parameters = dict(sae.named_parameters())
    assert {"W_enc_rows", "W_dec", "b_dec"} <= before.keys()
    for name, slots in before.items():
        state = optimiser.state[parameters[name]]
        assert torch.equal(state["step"], slots["step"])
        for slot in ("exp_avg", "exp_avg_sq"):
            if name == "b_dec":
                assert torch.equal(state[slot], slots[slot])
                continue
            assert not state[slot][DEAD].any(), (name, slot)
            assert torch.equal(state[slot][living], slots[slot][living]), (name, slot)


def test_counters_start_again(trained):
    _, optimiser, strategy, x = trained()
    strategy.intervene(iter([x]), optimiser, generator())
    assert strategy.rows_since_fired[DEAD].tolist() == [0] * len(DEAD)
    assert strategy.rows_since_fired[0] == 9 and not strategy.dead.any()


def test_with_fewer_rows_than_dead_latents_the_rest_stay_dead(trained):
    sae, optimiser, strategy, x = trained()
    before = sae.W_dec.detach().clone()
    strategy.intervene(iter([x[:2]]), optimiser, generator())
    assert strategy.dead.nonzero().squeeze(1).tolist() == DEAD[2:]
    assert torch.equal(sae.W_dec[DEAD[2:]], before[DEAD[2:]])


def test_without_dead_latents_nothing_is_read(trained):
    sae, optimiser, strategy, _ = trained()
    strategy.rows_since_fired.zero_()
    before = sae.W_dec.detach().clone()
    strategy.intervene(iter([]), optimiser, generator())
    assert torch.equal(sae.W_dec, before)


def test_new_encoder_rows_get_a_gradient(trained):
    sae, optimiser, strategy, x = trained()
    with torch.no_grad():
        sae.b_enc[DEAD] = -100.0
    for has_gradient in (False, True):
        sae.zero_grad()
        sae.loss(x, TrainState()).total.backward()
        moved = sae.W_enc_rows.grad[DEAD].abs().amax(1) > 0
        assert moved.all() if has_gradient else not moved.any()
        strategy.intervene(iter([x]), optimiser, generator())


def test_dead_latents_fire_again(new, revived):
    def sae():
        return new("relu", 32, 64, l1_coefficient=0.5)

    assert revived(sae(), {"type": "none"}) == 0
    assert revived(sae(), {"type": "resample", **OPTIONS}) > 0.8


# -- When ----------------------------------------------------------------------------------------


def test_it_steps_in_at_shares_of_training_and_never_at_its_ends(new):
    sae = new("relu", 2, 8)
    shares = [0.5, 0.125, 0.0, 1.0, 0.5]
    strategy = Resample(sae, 1, **{**OPTIONS, "at": shares})
    assert strategy.steps(200) == [25, 100]
    assert strategy.steps(2) == [1]
    assert Resample(sae, 1, **{**OPTIONS, "at": [0.001]}).steps(100) == []


def test_the_learning_rate_rises_again_after_each(new):
    strategy = Resample(new("relu", 2, 8), 1, **{**OPTIONS, "at": [0.3, 0.7], "lr_warmup": 0.2})
    found = [strategy.lr_factor(step, 20) for step in range(20)]
    again = [0.25, 0.5, 0.75, 1.0]
    assert found == pytest.approx([1.0] * 6 + again + [1.0] * 4 + again + [1.0] * 2)
    strategy = Resample(new("relu", 2, 8), 1, **{**OPTIONS, "lr_warmup": 0.0})
    assert {strategy.lr_factor(step, 20) for step in range(20)} == {1.0}


# -- Refused -------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(new):
    cfg = {"type": "resample", **OPTIONS}
    with pytest.raises(ConfigError, match=r"sae\.dead_latents\.at=\[\]: needs a share"):
        DEAD_LATENTS.build({**cfg, "at": []}, sae=new("relu", 2, 8), window=1)
    with pytest.raises(ConfigError, match=r"sae\.dead_latents\.at=.*1\.5: must be <= 1"):
        DEAD_LATENTS.build({**cfg, "at": [1.5]}, sae=new("relu", 2, 8), window=1)
    with pytest.raises(ConfigError, match="sae/dead_latents=resample: decoder rows are mixtures"):
        DEAD_LATENTS.build(cfg, sae=new("archetypal", 8, 24), window=1)
