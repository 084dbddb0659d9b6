"""Adam latent by latent is torch's Adam on the dense gradient."""

import copy

import pytest
import torch

from sae_runner.kernels import native_ops
from sae_runner.kernels.choice import using
from sae_runner.kernels.selection import Selector
from sae_runner.saes import base
from sae_runner.saes.base import TrainState
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.update import Update

native = pytest.mark.skipif(not native_ops.available(), reason="no C++ compiler")
D_IN, D_SAE = 12, 96


OF_KERNELS = pytest.mark.parametrize("kernels", ["torch", pytest.param("auto", marks=native)])


def updating(sae, options, by_rows):
    """An update that finds gradients by rows, or writes them out for torch's Adam."""
    update = Update(sae, options, 1e-3)
    assert update.by_rows
    update.by_rows = by_rows
    return update


def trained(sae, batches, options, by_rows, *, n_steps=6, dead=None):
    """The SAE after some steps, its update, and the norms that were measured."""
    update, norms = updating(sae, options, by_rows), []
    for step in range(n_steps):
        x = batches[step % len(batches)]
        with update.gradients():
            loss = sae.loss(x, TrainState(progress=step / n_steps))
            if dead is not None:
                loss = dead.add_to(loss, x)
            loss.total.backward()
            norms.append(update.step(1e-3 * (step + 1), measured=True).item())
    return sae, update, norms


@OF_KERNELS
@pytest.mark.parametrize("precision", ["fp32", "screened"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("topk", {}),
        ("topk", {"multi_topk": 0.125}),
        ("topk", {"decoder_norm": "free", "apply_b_dec_to_input": False}),
        ("batch_topk", {}),
        ("matryoshka", {}),
        ("archetypal", {}),
        ("jump_relu", {"bandwidth": 0.1, "initial_threshold": 0.5, "initial_l0": 1}),
        ("gated", {}),
    ],
)
def test_steps_are_those_of_torch(
    make, rows, options, monkeypatch, kind, changes, clip, precision, kernels
):
    if kind == "gated":
        monkeypatch.setattr(base, "FEW", 2.0)  # However many are above 0.
    sae = make(kind, D_IN, D_SAE, **changes)
    batches = [rows(64, D_IN, seed=seed) for seed in range(3)]
    wanted = options(clip_grad_norm=clip, micro_batch_size=None)
    auxk = {"type": "auxk", "coefficient": 0.5, "k_aux": 4}
    saes = []
    for by_rows in (False, True):
        with using(kernels if by_rows else "torch"):
            mine = copy.deepcopy(sae)
            mine.selector.precision = precision
            dead = DEAD_LATENTS.build(auxk, sae=mine, window=10) if kind == "topk" else None
            if dead is not None:
                dead.rows_since_fired[::3] = 10
            saes.append(trained(mine, batches, wanted, by_rows, dead=dead))
    (a, plain, norms_a), (b, own, norms_b) = saes
    assert norms_b == pytest.approx(norms_a, rel=1e-4)
    for (name, p), q, start in zip(
        a.named_parameters(), b.parameters(), sae.parameters(), strict=True
    ):
        moved = (p - start).norm()
        assert (p - q).norm() <= 2e-3 * moved, name
        for slot in ("exp_avg", "exp_avg_sq"):
            of_a, of_b = plain.optimizer.state[p][slot], own.optimizer.state[q][slot]
            torch.testing.assert_close(of_b, of_a, rtol=2e-3, atol=2e-3 * float(of_a.abs().max()))
        assert plain.optimizer.state[p]["step"] == own.optimizer.state[q]["step"] == 6
    assert b.W_enc_rows.grad is None or kind == "jump_relu"


@OF_KERNELS
def test_no_screen_is_of_weights_as_they_were(make, rows, options, monkeypatch, kernels):
    """A step by rows, then a dense one: PyTorch's Adam changes weights without a trace."""
    sae, x = make("relu", D_IN, D_SAE), rows(64, D_IN)
    sae.selector.precision = "screened"
    with using(kernels):
        update = Update(sae, options(clip_grad_norm=None, micro_batch_size=None), 1e-2)
    for few in (2.0, -1.0, -1.0):
        monkeypatch.setattr(base, "FEW", few)
        with using(kernels), update.gradients():
            sae.loss(x, TrainState()).total.backward()
            update.step(0.1, measured=False)
        found = sae.selector.above(x, sae.W_enc_rows, sae.b_enc, torch.zeros(D_SAE))
        expected = Selector().above(x, sae.W_enc_rows, sae.b_enc, torch.zeros(D_SAE))
        assert found.indices.equal(expected.indices)


@OF_KERNELS
def test_a_gradient_that_is_partly_dense_is_added_up(make, rows, options, kernels):
    sae, x = make("topk", D_IN, D_SAE, decoder_norm="free"), rows(32, D_IN)
    other = copy.deepcopy(sae)
    for mine, by_rows in ((sae, False), (other, True)):
        with using(kernels if by_rows else "torch"):
            wanted = options(clip_grad_norm=None, micro_batch_size=None)
            update = updating(mine, wanted, by_rows)
            with update.gradients():
                (mine.loss(x, TrainState()).total + mine.W_dec.square().sum()).backward()
                update.step(1e-3, measured=False)
    torch.testing.assert_close(other.W_dec, sae.W_dec, rtol=1e-4, atol=1e-6)


@OF_KERNELS
def test_dense_steps_are_counted_among_those_by_rows(make, rows, options, kernels):
    sae, x = make("topk", D_IN, D_SAE, decoder_norm="free"), rows(32, D_IN)
    other = copy.deepcopy(sae)
    for mine, by_rows in ((sae, False), (other, True)):
        with using(kernels if by_rows else "torch"):
            wanted = options(clip_grad_norm=None, micro_batch_size=None)
            update = updating(mine, wanted, by_rows)
            for step in range(6):
                with update.gradients():
                    total = mine.loss(x, TrainState()).total
                    dense = mine.W_dec.square().sum() if step in (2, 3) else 0
                    (total + dense).backward()
                    update.step(1e-3, measured=False)
    assert update.optimizer.state[other.W_dec]["step"] == 6
    torch.testing.assert_close(other.W_dec, sae.W_dec, rtol=0, atol=2e-5)


def test_a_norm_is_measured_where_it_is_wanted(make, rows, options):
    sae, x = make("topk", D_IN, D_SAE), rows(32, D_IN)
    update = Update(sae, options(clip_grad_norm=None, micro_batch_size=None), 1e-3)
    for measured in (True, False):
        with update.gradients():
            sae.loss(x, TrainState()).total.backward()
            assert (update.step(1e-3, measured=measured) is not None) == measured
