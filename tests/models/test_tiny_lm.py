import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sae_runner.data import build_dataset
from sae_runner.data.base import Dataset, Example, split_ids
from sae_runner.data.digits import Digits
from sae_runner.errors import ConfigError, Interrupted
from sae_runner.models import _tiny_training, build_model, tiny_lm
from sae_runner.models._tiny_training import Recipe, batches, rate, unigram_loss

torch.set_num_threads(1)

OPTIONS = {
    "type": "tiny_lm", "weights": None, "vocab_size": 300, "n_layers": 2, "d_model": 32,
    "n_heads": 2, "context": 16, "prepend_bos": True, "n_steps": 60, "rows_per_step": 16,
    "learning_rate": 0.01, "seed": 0, "precision": "fp32",
}  # fmt: skip
WORDS = ["cat", "sat", "on", "the", "mat", "dog", "ran", "to", "a", "hat"]


class Sentences(Dataset):
    """Documents of a fixed cycle of words from a seeded start: each word tells the next."""

    modality, kind, name = "text", "corpus", "sentences"

    def __init__(self, n: int = 60, seed: int = 0) -> None:
        self.n, self.seed = n, seed

    def ids(self, split):
        return split_ids(self.n, split, heldout=0.2, seed=self.seed)

    def load(self, ids):
        return [Example(int(i), " ".join(WORDS[(int(i) + j) % 10] for j in range(40))) for i in ids]

    def fingerprint(self):
        return str(self.n)


def build(outputs, dataset=None, meta=False, **options):
    return build_model(
        OPTIONS | options, device=torch.device("cpu"), meta=meta, outputs=outputs,
        dataset=dataset or Sentences(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def model(outputs):
    return build(outputs)


def folder_of(outputs):
    (folder,) = (outputs / "models").glob("tiny_lm-*")
    return folder


def test_it_learns_what_follows_what(model):
    training = model.describe()["training"]
    assert training["heldout_loss"] < 0.25 * training["unigram_loss"]


def test_losses_are_those_of_the_model_that_is_loaded(model):
    packed = model.adapt(Sentences())
    rows = torch.stack([torch.from_numpy(e.value) for e in packed.load(packed.ids("heldout"))])
    inputs = model.prepare(packed.load(packed.ids("heldout")))
    with torch.no_grad():
        logits = model.forward(inputs)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    training = model.describe()["training"]
    assert training["heldout_loss"] == pytest.approx(loss, rel=1e-4)
    assert training["n_tokens_heldout"] == rows[:, 1:].numel()

    train = [e.value[1:] for e in packed.load(packed.ids("train"))]
    counts = Counter(np.concatenate(train).tolist())
    total = sum(counts.values()) + 300
    surprise = [-math.log((counts[t] + 1) / total) for t in rows[:, 1:].flatten().tolist()]
    assert training["unigram_loss"] == pytest.approx(sum(surprise) / len(surprise), rel=1e-6)


def test_a_text_is_begun_as_the_model_reads_it_and_may_go_on(model):
    begun, nothing = model.begun(["cat sat on", ""])
    bos = model.prepare([Example(0, "cat")]).tensors["tokens"][0, 0].item()
    assert begun[0] == bos and nothing == [bos]
    assert "".join(model.pieces(begun[1:])) == "cat sat on"
    assert bos < model.n_vocab and max(begun) < model.n_vocab <= OPTIONS["vocab_size"]
    rows = model.token_rows([begun, nothing])
    assert rows.tensors["tokens"][0].tolist() == begun
    assert rows.attended.sum(1).tolist() == [len(begun), 1]


def test_unigram_loss_of_a_known_case():
    train = torch.tensor([[0, 1, 1, 2]])  # Targets 1, 1, 2; plus one: 1, 3, 2, 1 of 7.
    heldout = torch.tensor([[0, 1, 3, 3]])
    expected = -(math.log(3 / 7) + 2 * math.log(1 / 7)) / 3
    assert unigram_loss(train, heldout, 4) == pytest.approx(expected)


def test_the_artefact_is_a_folder_that_other_libraries_load(model, outputs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sae_runner.models._pretrained import quiet

    folder = folder_of(outputs)
    assert {p.name for p in folder.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "training.json",
    }  # fmt: skip
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        network = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("the mat", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "the mat"
    inputs = model.prepare([Example(0, "the mat")])
    assert inputs.tensors["tokens"][0].tolist() == [tokenizer.bos_token_id, *ids[0].tolist()]
    with torch.no_grad():
        expected = network(inputs.tensors["tokens"]).logits
        assert torch.equal(model.forward(inputs), expected)


def test_it_is_trained_once(model, outputs, monkeypatch):
    monkeypatch.setattr(tiny_lm, "make", None)
    again = build(outputs)
    assert again.fingerprint() == model.fingerprint()
    assert len(list((outputs / "models").glob("tiny_lm-*"))) == 1
    assert not list((outputs / "models").glob(".*partial"))


def test_training_is_reproducible_and_leaves_the_global_generator_alone(model, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = build(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.fingerprint() == model.fingerprint()


def test_a_stopped_training_goes_on_to_the_same_bits(model, tmp_path, stop_at):
    with stop_at(41), pytest.raises(Interrupted, match=r"stopped at step 41 of 60 .* tiny_lm"):
        build(tmp_path)
    again = build(tmp_path)
    assert again.fingerprint() == model.fingerprint()
    assert not list((tmp_path / "models").glob("tiny_lm-*/training"))


def test_what_decides_the_weights_decides_the_folder(model, outputs, monkeypatch):
    made = []

    def make(recipe, dataset, folder, data_folder, device, kept):
        made.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_lm, "make", make)
    for options in (
        {"seed": 1}, {"n_steps": 61}, {"learning_rate": 0.02}, {"prepend_bos": False},
        {"context": 8}, {"dataset": Sentences(61)}, {"dataset": Sentences(seed=1)},
    ):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            build(outputs, **options)
    build(outputs, precision="bf16")  # How it runs is no part of how it was made.
    assert len(made) == 7
    assert len(list((outputs / "models").glob("tiny_lm-*"))) == 1, (
        "a stopped training left a folder"
    )


def test_a_trained_folder_serves_as_weights(model, outputs, tmp_path):
    again = build(tmp_path, weights=str(folder_of(outputs)), n_steps=1)
    assert again.fingerprint() == model.fingerprint()
    assert again.describe()["training"] == model.describe()["training"]
    assert not (tmp_path / "models").exists()


def test_shapes_need_neither_data_nor_training(model, tmp_path):
    shapes = build_model(
        OPTIONS, device=torch.device("cpu"), meta=True, outputs=tmp_path, dataset=None
    )
    assert shapes.sites() == model.sites()
    assert "blocks.1.attn_z.1" in shapes.sites() and not any(tmp_path.iterdir())


def test_the_held_out_split_is_never_trained_on(tmp_path, monkeypatch):
    """Held-out documents reach neither the tokenizer nor the steps."""
    seen, dataset = [], Sentences()
    heldout = set(dataset.ids("heldout").tolist())
    steps = []
    plain_train = _tiny_training.train

    def load(ids):
        seen.extend(map(int, ids))
        return Sentences.load(dataset, ids)

    def train(network, rows, recipe, kept):
        steps.append(rows)
        return plain_train(network, rows, recipe, kept)

    def tokenizer(dataset, vocab_size, folder):
        original(dataset, vocab_size, folder)
        assert seen and not heldout & set(seen)

    original = _tiny_training.train_tokenizer
    monkeypatch.setattr(dataset, "load", load)
    monkeypatch.setattr(_tiny_training, "train", train)
    monkeypatch.setattr(_tiny_training, "train_tokenizer", tokenizer)
    model = build(tmp_path, dataset, n_steps=2)
    packed = model.adapt(dataset)
    assert torch.equal(steps[0], packed.rows["train"].long())
    assert len(packed.ids("train")) == len(steps[0])


def test_every_pass_sees_every_row_once():
    recipe = Recipe(300, 1, 8, 1, 8, True, 10, 6, 0.01, 3)
    indices = torch.cat(list(batches(20, recipe)))
    assert len(indices) == 60
    for start in (0, 20, 40):
        assert sorted(indices[start : start + 20].tolist()) == list(range(20))
    assert not torch.equal(indices[:20], indices[20:40])


def test_the_learning_rate_rises_and_falls_to_a_tenth():
    values = [rate(step, 100) for step in range(101)]
    assert values[0] == pytest.approx(0.2) and max(values) == 1.0 == values[5]
    assert values[100] == pytest.approx(0.1)
    assert values[5:] == sorted(values[5:], reverse=True)


def test_labelled_text_serves_too(tmp_path):
    rows = "".join(f"{' '.join(WORDS)} number {i}\t{i % 2}\n" for i in range(40))
    (tmp_path / "rows.tsv").write_text(rows)
    options = {
        "type": "text", "name": "rows", "path": str(tmp_path / "rows.tsv"), "split": None,
        "subset": None, "revision": None, "heldout_path": None, "heldout_split": None,
        "heldout": 0.25, "columns": ["text", "label"], "text_column": None, "label_column": None,
        "label_names": None, "kind": "labelled", "document_separator": None, "n_examples": None,
        "n_heldout": None, "streaming": False, "seed": 0,
    }  # fmt: skip
    dataset = build_dataset(options)
    model = build(tmp_path, dataset, n_steps=3)
    assert model.adapt(dataset) is dataset
    inputs = model.prepare(dataset.load(dataset.ids("heldout")[:3]))
    assert inputs.labels is not None and model.forward(inputs).shape[2] == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 3}, r"model\.n_heads=3 does not divide model\.d_model=32"),
        ({"vocab_size": 256}, r"model\.vocab_size=256: must be >= 257"),
        ({"context": 1}, r"model\.context=1: nothing to predict"),
        ({"learning_rate": 0}, r"model\.learning_rate=0.*: must be > 0"),
        ({"weights": "/no/such"}, r"model\.weights=/no/such: no such folder"),
        (
            {"dataset": Digits(heldout=0.2, n_examples=None, n_heldout=None, seed=0)},
            r"tiny_lm trains on text, and was given dataset=digits of image",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, **options)


def test_a_divergence_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.learning_rate=.*: diverged"):
        build(tmp_path, learning_rate=1e30, n_steps=10)
    assert not list((tmp_path / "models").glob("tiny_lm-*"))


def test_training_json_holds_the_recipe(outputs, model):
    report = json.loads((folder_of(outputs) / "training.json").read_text())
    assert report["recipe"]["n_steps"] == 60 and report["unit"] == "nats per token"
    assert report["n_tokens_trained"] == 60 * 16 * 15
    assert report["dataset"]["name"] == "sentences"
