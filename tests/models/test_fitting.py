"""The loop that trains networks here, against the same steps written out."""

import itertools
import logging
import math
import signal

import pytest
import torch
from torch import nn

from sae_runner.errors import ConfigError, Interrupted
from sae_runner.models import _fitting
from sae_runner.models._fitting import FACTS, TENSORS, fit

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """A weight under two names, a buffer that moves, and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.3)

    def forward(self, x):
        return self.second(self.drop(self.first(self.norm(x))))


def new():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = Tied()
    return network, torch.optim.AdamW(network.parameters(), lr=0.1)


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in itertools.count():
        yield torch.randint(40, (8,), generator=generator)


def factor(step):
    return 1 / (1 + step)


def run(kept, n_steps=12, lr_factor=factor):
    network, optimizer = new()
    noise = torch.Generator().manual_seed(2)

    def loss_of(rows):
        x = X[rows] + 0.1 * torch.randn(8, 5, generator=noise)
        return (network(x) - X[rows]).square().mean()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        losses = fit(
            network, optimizer, batches(), loss_of, lr_factor, n_steps=n_steps, kept=kept,
            what="net", max_grad_norm=0.5, generators=[noise, torch.default_generator],
        )  # fmt: skip
    return network.state_dict(), losses


def by_hand(n_steps):
    network, optimizer = new()
    noise, losses = torch.Generator().manual_seed(2), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for step, rows in enumerate(itertools.islice(batches(), n_steps)):
            optimizer.param_groups[0]["lr"] = 0.1 * factor(step)
            x = X[rows] + 0.1 * torch.randn(8, 5, generator=noise)
            loss = (network(x) - X[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters()))
            for p in network.parameters():
                p.grad *= min(1.0, 0.5 / norm)
            optimizer.step()
            losses.append(loss.item())
    return network.state_dict(), losses


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(v, second[k]) for k, v in first.items()
    )


def test_its_steps_are_those_of_the_recipe(tmp_path):
    weights, losses = run(tmp_path / "kept")
    expected, expected_losses = by_hand(12)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "kept").exists()  # Nothing is written where nothing stops it.


@pytest.mark.parametrize("steps", [(1,), (5,), (3, 4, 11), (12,)])
def test_it_goes_on_with_the_same_bits(tmp_path, stop_at, steps):
    expected = run(tmp_path / "whole")
    for step in steps:
        with stop_at(step), pytest.raises(Interrupted, match=f"step {step} of 12") as stopped:
            run(tmp_path / "kept")
        assert stopped.value.exit_code == 128 + signal.SIGTERM
        assert "type the same command to go on" in str(stopped.value)
    weights, losses = run(tmp_path / "kept")
    assert losses == expected[1] and same(weights, expected[0])


def test_a_killed_process_finds_the_last_minute(tmp_path, monkeypatch):
    monkeypatch.setattr(_fitting, "SAVE_EVERY_S", -1.0)
    expected = run(tmp_path / "kept")  # Each step was saved; the last one is read.
    assert same(run(tmp_path / "kept")[0], expected[0])


@pytest.mark.parametrize("damage", ["tensors", "facts", "lost"])
def test_a_damaged_state_is_said_and_begins_again(tmp_path, stop_at, caplog, damage):
    expected, kept = run(tmp_path / "whole"), tmp_path / "kept"
    with stop_at(5), pytest.raises(Interrupted):
        run(kept)
    file = kept / (FACTS if damage == "facts" else TENSORS)
    file.write_bytes(file.read_bytes()[:-7]) if damage != "lost" else file.unlink()
    with caplog.at_level(logging.WARNING):
        assert same(run(kept)[0], expected[0])
    assert "is damaged" in caplog.text and "begins again" in caplog.text


def test_what_diverges_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_fitting, "SAVE_EVERY_S", -1.0)
    with pytest.raises(ConfigError, match=r"model\.learning_rate=0\.1: diverged at step \d"):
        run(tmp_path / "kept", lr_factor=lambda step: 1e30)
    assert not (tmp_path / "kept").exists()
