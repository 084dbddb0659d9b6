import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae_runner.data.base import Example, Unreadable
from sae_runner.data.digits import Digits
from sae_runner.errors import ConfigError, DataError, Interrupted, StoreError
from sae_runner.models._artefact import FACTS, WEIGHTS, assign, chunks_of, load, trained

IDENTITY = {"seed": 0, "sizes": [3, 2]}


def weights() -> dict[str, Tensor]:
    return {"weight": torch.arange(6.0).view(3, 2).T, "bias": torch.ones(2)}


def test_a_stopped_training_keeps_what_it_needs_until_it_is_done(tmp_path: Path) -> None:
    stops = [True, False]

    def train(kept: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if stops.pop(0):
            kept.mkdir(parents=True)
            (kept / "state").touch()
            raise Interrupted(signal.SIGTERM)
        assert (kept / "state").is_file()
        return weights(), {}

    with pytest.raises(Interrupted, match="SIGTERM: type the same command to go on") as stopped:
        trained(tmp_path, "net", IDENTITY, train)
    assert stopped.value.exit_code == 143
    trained(tmp_path, "net", IDENTITY, train)
    (folder,) = (tmp_path / "models").glob("net-*")
    assert sorted(p.name for p in folder.iterdir()) == [FACTS, WEIGHTS]


def test_it_trains_once_and_is_read_back(tmp_path: Path) -> None:
    calls: list[int] = []

    def train(kept: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        calls.append(1)
        return weights(), {"heldout_accuracy": 0.5}

    first = trained(tmp_path, "net", IDENTITY, train)
    again = trained(tmp_path, "net", IDENTITY, train)
    assert len(calls) == 1
    for artefact in (first, again):
        assert artefact.facts["heldout_accuracy"] == 0.5
        assert artefact.facts["identity"] == IDENTITY
        assert all(torch.equal(artefact.tensors[k], v) for k, v in weights().items())
    (folder,) = (tmp_path / "models").glob("net-*")
    assert sorted(p.name for p in folder.iterdir()) == [FACTS, WEIGHTS]
    trained(tmp_path, "net", {**IDENTITY, "seed": 1}, train)
    assert len(calls) == 2


def test_a_training_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def train(kept: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="luck"):
        trained(tmp_path, "net", IDENTITY, train)
    assert not list((tmp_path / "models").glob("net-*"))
    nan = {"accuracy": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        trained(tmp_path, "net", IDENTITY, lambda _: (weights(), nan))
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]


def train_slowly(outputs: Path, count: Path) -> None:
    def train(kept: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with count.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return weights(), {}

    trained(outputs, "net", IDENTITY, train)


def test_of_two_processes_one_trains(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    both = [
        fork.Process(target=train_slowly, args=(tmp_path, tmp_path / "count")) for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert len((tmp_path / "count").read_text().split()) == 1


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = Path(trained(tmp_path, "net", IDENTITY, lambda _: (weights(), {})).facts["path"])
    facts = json.loads((path / FACTS).read_text())
    (path / FACTS).write_text(json.dumps({**facts, "sha256": "0" * 64}))
    with pytest.raises(StoreError, match="not the bytes"):
        load(path)
    (path / FACTS).unlink()
    assert load(path).tensors.keys() == weights().keys()
    (path / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="no safetensors"):
        load(path / WEIGHTS)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.weights=.*nowhere.*no file"):
        load(tmp_path / "nowhere")
    (tmp_path / "net.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"only \.safetensors"):
        load(tmp_path / "net.pth")


def test_assign_wants_exactly_the_network_s_tensors() -> None:
    network = nn.Linear(3, 2)
    assign(network, weights(), "here")
    assert torch.equal(network.weight, weights()["weight"])
    with pytest.raises(ConfigError, match=r"^here: the file lacks tensor 'bias'"):
        assign(network, {"weight": weights()["weight"]}, "here")
    with pytest.raises(ConfigError, match="the model has no tensor 'extra'"):
        assign(network, {**weights(), "extra": torch.ones(1)}, "here")
    with pytest.raises(ConfigError, match=r"bias has shape \(3,\), the model needs \(2,\)"):
        assign(network, {**weights(), "bias": torch.ones(3)}, "here")


class Torn(Digits):
    """400 digits to train on and 100 to measure on; some of the former cannot be read."""

    def __init__(self, n_bad: int, max_bad: float) -> None:
        super().__init__(heldout=0.2, n_examples=400, n_heldout=100, seed=0)
        self.bad, self.max_bad = set(self.ids("train")[5 : 5 + n_bad].tolist()), max_bad

    def load(self, ids: Any) -> list[Example | Unreadable]:
        found = super().load(ids)
        return [Unreadable(e.id, "torn") if e.id in self.bad else e for e in found]


def test_a_model_that_trains_here_leaves_out_what_is_unreadable_and_says_so(caplog) -> None:
    """The share is of everything: 10 of 500, though 10 of 400 train."""
    dataset = Torn(10, max_bad=0.02)
    chunks = list(chunks_of(dataset, dataset.ids("train"), size=64))
    good = [example.id for chunk in chunks for example in chunk]
    assert good == sorted(set(dataset.ids("train").tolist()) - dataset.bad)
    named = [r.message for r in caplog.records if r.message.startswith("unreadable example")]
    assert named == [f"unreadable example {i}: torn" for i in sorted(dataset.bad)[:5]]


def test_a_model_that_trains_here_stops_past_the_share(caplog) -> None:
    dataset = Torn(11, max_bad=0.02)
    first = min(dataset.bad)
    message = rf"dataset\.max_bad=0\.02: 11 of 500 examples are unreadable, e\.g\. {first}: torn"
    with pytest.raises(DataError, match=message):
        list(chunks_of(dataset, dataset.ids("train")))
    # Of a sample that is trained on, with everything that is held out.
    sample = dataset.ids("train")[:100]
    with pytest.raises(DataError, match="11 of 200 examples"):
        list(chunks_of(dataset, sample))
