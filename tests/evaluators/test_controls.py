from dataclasses import replace

import pytest
import torch
from sae_fixtures import build, stats_of

from sae_runner.config import preset
from sae_runner.evaluators._controls import Controls, columns, untrained_like
from sae_runner.evaluators.base import EvalContext, Rows
from sae_runner.saes import SAES
from sae_runner.saes.base import Latents

D, D_SAE, N = 8, 32, 400


def x_of(seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def context_of(sae, x):
    ids = torch.arange(N)
    rows = Rows(x, sae(x).latents, x, ids, torch.zeros(N, dtype=torch.int64), None)
    return rows, EvalContext(sae, N, ids.numpy(), 0, rows=lambda split, n: iter([rows]))


@pytest.mark.parametrize("kind", ["topk", "relu", "batch_topk", "jump_relu", "gated", "matryoshka"])
def test_an_untrained_sae_is_what_training_begins_with_and_fires(kind):
    x, trained = x_of(), build(kind, D, D_SAE)
    trained.initialise(stats_of(x), torch.Generator().manual_seed(0))
    if trained.calibrates:
        trained.calibrate(iter([x]), N)
    before = trained.W_dec.clone()
    fresh = untrained_like(trained, x, 0)
    assert fresh.config() == trained.config() and type(fresh) is type(trained)
    assert torch.equal(trained.W_dec, before)
    cosines = torch.nn.functional.cosine_similarity(fresh.W_dec, before)
    assert cosines.abs().mean() < 0.6  # Not the same draw again, where the seed is.
    latents = fresh(x).latents
    l0 = float(latents.counts.double().mean())
    assert 0 < l0 < D_SAE
    if trained.calibrates:  # A threshold for k = 3, not what it had before it was measured.
        assert l0 == pytest.approx(3, rel=0.1)
    assert torch.equal(untrained_like(trained, x, 0).W_dec, fresh.W_dec)


def test_controls_are_followed_through_the_pass():
    x, sae = x_of(), build("topk", D, D_SAE)
    sae.initialise(stats_of(x), torch.Generator().manual_seed(0))
    rows, context = context_of(sae, x)
    controls = Controls(context, n_neurons=5, n_directions=3, n_untrained=6)
    for part in (slice(0, 100), slice(100, N)):
        latents = Latents.from_dense(torch.zeros(N, 1)[part])
        controls.update(Rows(x[part], latents, x[part], rows.example_id[part],
                             rows.position[part], None))  # fmt: skip
    found, codes = controls.finish()
    assert [c.source for c in found] == ["neuron"] * 5 + ["direction"] * 3 + ["untrained"] * 6
    fresh = untrained_like(sae, x, 0)
    for i, control in enumerate(found):
        row, value = codes.firing(i)
        acts = torch.zeros(N)
        acts[row] = value
        if control.source == "untrained":
            expected = fresh(x).latents.dense()[:, control.id]
            torch.testing.assert_close(control.direction, fresh.W_dec[control.id])
            assert len(row) > 0
        else:
            assert float(control.direction.norm()) == pytest.approx(1)
            expected = (x @ control.direction).relu()
        torch.testing.assert_close(acts, expected)
    assert len({c.id for c in found[:5]}) == 5
    assert all(found[i].direction[found[i].id] == 1 for i in range(5))
    other = Controls(context, n_neurons=99, n_directions=0, n_untrained=0)
    assert [c.id for c in other.all] == list(range(D))


def test_columns_of_sparse_latents_are_those_of_dense_ones():
    f = torch.rand(20, 12)
    f[f < 0.6] = 0
    chosen = torch.tensor([2, 7, 11])
    assert torch.equal(columns(Latents.from_dense(f), chosen), f[:, chosen])


def test_the_untrained_control_of_a_transcoder_reads_what_the_transcoder_reads():
    """From other rows than those that the neurons are coordinates of."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(N, D, generator=generator), 5 + torch.randn(N, 4, generator=generator)
    cfg = preset("sae", "transcoder") | {"d_sae": D_SAE, "expansion": None, "k": 3}
    trained = SAES.build(cfg, d_in=D, d_out=4)
    trained.initialise(stats_of(torch.cat([x, y], 1)), torch.Generator().manual_seed(0))
    ids, zeros = torch.arange(N), torch.zeros(N, dtype=torch.int64)
    rows = Rows(y, trained(x).latents, y, ids, zeros, None, x)
    context = EvalContext(trained, N, ids.numpy(), 0, rows=lambda split, n: iter([rows]))
    controls = Controls(context, n_neurons=4, n_directions=1, n_untrained=6)
    controls.update(rows)
    found, codes = controls.finish()
    fresh = untrained_like(trained, x, 0, target=y)
    torch.testing.assert_close(fresh.b_dec, trained.b_dec)  # A centre of y: no zeros.
    assert fresh.b_dec.mean() > 0.5
    for i, control in enumerate(found):
        row, value = codes.firing(i)
        acts = torch.zeros(N)
        acts[row] = value
        if control.source == "untrained":
            torch.testing.assert_close(acts, fresh(x).latents.dense()[:, control.id])
            assert len(row) and len(control.direction) == 4
        else:
            torch.testing.assert_close(acts, (y @ control.direction).relu())
    assert [c.source for c in found[5:]] == ["untrained"] * 6


@pytest.mark.parametrize("known", [True, False])
def test_neurons_may_be_counted_from_their_mean(known):
    x, sae = x_of() + 20, build("topk", D, D_SAE)
    sae.initialise(stats_of(x), torch.Generator().manual_seed(0))
    rows, context = context_of(sae, x)
    mean = x.double().mean(0)
    context = replace(context, mean=mean if known else None)
    controls = Controls(context, n_neurons=5, centre=True)
    controls.update(rows)
    found, codes = controls.finish()
    for i, control in enumerate(found):
        row, value = codes.firing(i)
        acts = torch.zeros(N)
        acts[row] = value
        expected = (x[:, control.id] - float(mean[control.id])).relu()
        torch.testing.assert_close(acts, expected, atol=1e-5, rtol=1e-5)
        assert 0.3 * N < len(row) < 0.7 * N
