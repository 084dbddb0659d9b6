import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_runner import checkpoint, files
from sae_runner.checkpoint import (
    find_checkpoint,
    load_sae,
    load_state,
    read_facts,
    save_checkpoint,
    step_dirs,
)
from sae_runner.config import preset
from sae_runner.errors import StoreError
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE
from sae_runner.statistics import ActivationStats

X = 5 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) + 2
FACTS = {"step": 3, "n_tokens": 30, "model": {"name": "toy"}}


def trained(kind: str, **options: Any) -> SAE:
    """An SAE whose every weight differs from its initial value, with a scale that is not 1."""
    cfg = preset("sae", kind) | {"d_sae": 10, "expansion": None, **options}
    sae = SAES.build(cfg, d_in=6)
    norms = X.norm(dim=1)
    stats = ActivationStats(X.mean(0), float(norms.mean()), float(norms.square().mean()), X)
    with torch.no_grad():
        sae.initialise(stats, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    sae.after_step()
    return sae


KINDS = [("relu", {}), ("topk", {"k": 3}), ("topk", {"k": 3, "input_scaling": "none"})]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join([kind[0], *map(str, kind[1].values())]))
def sae(request) -> SAE:
    return trained(request.param[0], **request.param[1])


def save(folder: Path, sae: SAE, **changes: Any) -> Path:
    options: dict[str, Any] = {"state": {"step": 3}, "optimizer": {"m": torch.arange(3.0)}}
    save_checkpoint(folder, sae, FACTS, **{**options, **changes})
    return folder


def test_what_is_loaded_takes_raw_activations_and_gives_the_same(tmp_path, sae):
    expected = sae(X)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    folder = save(tmp_path / "step_00000003", sae)
    # Saving folds a copy: the one in training stays as it is.
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    loaded = load_sae(folder)
    torch.testing.assert_close(loaded(X).x_hat, expected.x_hat)
    assert torch.equal(loaded(X).latents.dense() > 0, expected.latents.dense() > 0)
    assert float(loaded.input_scale) == 1 and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_disk_shapes_and_facts_are_the_documented_ones(tmp_path, sae):
    folder = save(tmp_path / "step_00000003", sae)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "cfg.json", "sae.safetensors", "state/optimizer.safetensors", "state/trainer.json",
        "state/weights.safetensors",
    ]  # fmt: skip
    tensors = load_file(folder / "sae.safetensors")
    assert tensors["W_enc"].shape == (6, 10) and tensors["W_dec"].shape == (10, 6)
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(10))
    facts = read_facts(folder)
    assert facts["schema"] == "sae-run.checkpoint/1" and facts["d_in"] == 6
    assert {key: facts[key] for key in FACTS} == FACTS
    assert facts["sae"]["type"] == sae.kind and facts["sae"]["d_sae"] == 10


def test_the_state_comes_back_bit_for_bit(tmp_path, sae):
    folder = save(tmp_path / "step_00000003", sae)
    state, weights, optimizer = load_state(folder)
    assert state == {"step": 3} and optimizer["m"].tolist() == [0, 1, 2]
    other = SAES.build(sae.config(), d_in=6)
    other.load_tensors(weights)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_checkpoint_without_state_serves_but_for_going_on(tmp_path, sae):
    folder = save(tmp_path / "step_00000003", sae, state=None)
    assert load_sae(folder).d_sae == 10 and not (folder / "state").exists()
    with pytest.raises(StoreError, match="was kept without its training state"):
        load_state(folder)


def test_the_same_weights_are_the_same_bytes(tmp_path, sae):
    a, b = (save(tmp_path / name / "step_00000003", sae) for name in "ab")
    for path in (p.relative_to(a) for p in a.rglob("*") if p.is_file()):
        assert (a / path).read_bytes() == (b / path).read_bytes(), path


def test_a_second_save_takes_the_place_of_the_first(tmp_path):
    folder = save(tmp_path / "step_00000003", trained("relu"))
    save(folder, trained("topk", k=3), state=None)
    assert load_sae(folder).kind == "topk" and not (folder / "state").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    folder = save(tmp_path / "step_00000003", trained("relu"))
    real = files.write_tensors

    def write_tensors(path, tensors):
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(checkpoint.files, "write_tensors", write_tensors)
    with pytest.raises(OSError, match="No space"):
        save(folder, trained("topk", k=3))
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "step_00000004", trained("relu"))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]
    assert load_sae(folder).kind == "relu"


# -- Damage --------------------------------------------------------------------------------------

NAMES = ["sae.safetensors", "state/weights.safetensors", "state/optimizer.safetensors",
         "state/trainer.json"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_or_an_absent_file_is_named(tmp_path, name):
    path = save(tmp_path / "step_00000003", trained("relu")) / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match=f"is damaged: {name} differs from its hash"):
        load_sae(tmp_path / "step_00000003")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=f"is damaged: {name} differs from its hash"):
        read_facts(tmp_path / "step_00000003")
    path.unlink()
    with pytest.raises(StoreError, match=f"is damaged: {name} is absent"):
        read_facts(tmp_path / "step_00000003")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace('"k": 3', '"k": 4'), "cfg.json differs from its hash"),
        (lambda t: t.replace('"step": 3', '"step": 2'), "cfg.json differs from its hash"),
        (lambda t: t[: len(t) // 2], "is damaged: cfg.json: "),
        (lambda _: "", "is damaged: cfg.json: "),
        (lambda _: "[]", "schema 'list', expected 'sae-run.checkpoint/1'"),
        (lambda _: '{"d_in": 6}', "schema None, expected"),
        (lambda t: t.replace("checkpoint/1", "checkpoint/9"), "schema 'sae-run.checkpoint/9'"),
        (lambda t: json.dumps({**json.loads(t), "sha256": 1}), "cfg.json lacks its hashes"),
    ],
)
def test_a_cfg_that_is_not_the_one_written_is_refused_in_one_line(tmp_path, change, message):
    path = save(tmp_path / "step_00000003", trained("topk", k=3)) / "cfg.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(StoreError, match=message) as error:
        load_sae(tmp_path / "step_00000003")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_spaces_and_order_in_cfg_are_no_damage(tmp_path):
    path = save(tmp_path / "step_00000003", trained("topk", k=3)) / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    assert load_sae(tmp_path / "step_00000003").d_in == 6


# -- Which one -----------------------------------------------------------------------------------


def run_of(tmp_path: Path, *steps: int) -> Path:
    for step in steps:
        save(tmp_path / "run" / "checkpoints" / f"step_{step:08d}", trained("relu"))
    return tmp_path / "run"


def test_a_run_means_its_last_sound_checkpoint(tmp_path, caplog):
    run = run_of(tmp_path, 9, 10, 100_000_000)
    for name in (".step_00000100.12.partial", "step_00000011 (copy)", "notes"):
        (run / "checkpoints" / name).mkdir()
    assert [p.name for p in step_dirs(run)] == ["step_00000009", "step_00000010", "step_100000000"]
    assert find_checkpoint(run).name == "step_100000000"
    assert find_checkpoint(str(step_dirs(run)[0])).name == "step_00000009"
    (step_dirs(run)[2] / "sae.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(run).name == "step_00000010"
    assert "step_100000000 is damaged: sae.safetensors" in caplog.text
    assert "the checkpoint before it is used" in caplog.text
    assert load_sae(run).kind == "relu"


def test_nothing_that_can_be_used_is_said_by_its_path(tmp_path):
    with pytest.raises(StoreError, match=r"checkpoint=.*absent: there is no such folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(StoreError, match="no sound checkpoint in it; `sae-run ls`"):
        find_checkpoint(tmp_path)
    run = run_of(tmp_path, 1)
    (step_dirs(run)[0] / "cfg.json").unlink()
    with pytest.raises(StoreError, match="no sound checkpoint"):
        load_sae(run)
