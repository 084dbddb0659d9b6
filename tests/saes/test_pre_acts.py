"""A loss of few entries is that of all of them, with the same gradient."""

import pytest
import torch

from sae_runner.saes import base
from sae_runner.saes._pre_acts import Few
from sae_runner.saes.base import TrainState

D_IN, D_SAE = 6, 40
HIGH = {"initial_threshold": 0.4, "bandwidth": 0.3}


def gradients(sae, x, few, monkeypatch, state):
    monkeypatch.setattr(base, "FEW", 2.0 if few else -1.0)
    sae.zero_grad()
    seen = []
    above = sae.above
    monkeypatch.setattr(sae, "above", lambda *a: seen.append(above(*a)) or seen[-1])
    loss = sae.loss(x, state)
    loss.total.backward()
    assert all(isinstance(found, Few) == few for found in seen) and seen
    return loss, {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("relu", {}),
        ("relu", {"decoder_norm": "unit", "decoder_init_norm": 1, "apply_b_dec_to_input": True}),
        ("gated", {}),
        ("gated", {"decoder_norm": "free"}),
        ("p_anneal", {"p_end": 0.5}),
        ("p_anneal", {"p_end": 0.5, "decoder_norm": "free"}),
        ("jump_relu", HIGH),
        ("jump_relu", {"initial_threshold": 0.1, "bandwidth": 0.3}),
        (
            "jump_relu",
            {"penalty": "quadratic", "initial_threshold": 0.4, "bandwidth": 0.3, "target_l0": 4},
        ),
        ("jump_relu", {"penalty": "tanh", "initial_threshold": 0.4, "bandwidth": 0.5}),
    ],
)
def test_few_entries_give_the_loss_and_gradient_of_all(make, rows, monkeypatch, kind, options):
    sae, x = make(kind, D_IN, D_SAE, **options).double(), rows(70, D_IN).double()
    for state in (TrainState(progress=0.1), TrainState(progress=0.9)):
        dense, expected = gradients(sae, x, False, monkeypatch, state)
        sparse, found = gradients(sae, x, True, monkeypatch, state)
        assert float(dense.l0) > 0.5
        torch.testing.assert_close(sparse.total, dense.total, rtol=1e-12, atol=0)
        torch.testing.assert_close(sparse.x_hat, dense.x_hat, rtol=1e-10, atol=1e-12)
        assert sparse.fired.equal(dense.fired)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_a_few_rows_tell_which_is_cheaper(make, rows):
    sae, x = make("relu", D_IN, D_SAE), rows(70, D_IN)
    assert not isinstance(sae.above(sae.scaled(x), torch.zeros(D_SAE)), Few)
    high = torch.full((D_SAE,), 1e6)
    assert isinstance(sae.above(sae.scaled(x), high), Few)
