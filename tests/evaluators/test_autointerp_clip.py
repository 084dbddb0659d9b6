"""CLIP autointerp on a host whose latents are planted concepts."""

import numpy as np
import pytest
import torch
from codes_fixtures import bare, codes_of, context_of
from evaluators.conftest import assert_publishable
from explanation_fixtures import keep
from PIL import Image
from sae_fixtures import build

from sae_runner.config import preset
from sae_runner.data.base import Dataset, Example
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._explainers import clip
from sae_runner.evaluators._explainers.clip import embed_concepts
from sae_runner.evaluators.base import Rows, Setting
from sae_runner.models._text import TextTower
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.saes.base import Latents
from sae_runner.site import TokenSelection

CFG = preset("evaluators", "autointerp_clip")["autointerp_clip"]
WORDS = ("red_apple", "green pear", "blue plum", "fig", "nut")
N, D = 300, 9
SITE = SiteInfo("embed", "m", D, "vector", 1)


def vector_of(text):
    """A concept's own direction, and a little that all texts share."""
    name = text.removeprefix("a photo of a ").removesuffix(".").replace(" ", "_")
    known = [word.replace(" ", "_") for word in WORDS]
    v = torch.zeros(D)
    v[known.index(name) if name in known else 5] = 1.0
    v[6] = 3.0
    return v


class Tower(Model, TextTower):
    modality, device, templates = "image", torch.device("cpu"), ("a photo of a {}.", "{}")
    vectors, n_seen = None, 0

    def encode_text(self, texts):
        return torch.stack([vector_of(text) for text in texts])

    def prepare(self, examples):
        ids = torch.tensor([e.id for e in examples])
        return Inputs(ids, {"pixels": torch.zeros(len(examples), 1)})

    def splice(self, inputs, edits, positions=None):
        assert not edits
        self.n_seen += len(inputs)
        return self.vectors[inputs.ids] * (1 + inputs.ids[:, None])  # Norms mean nothing.

    def fingerprint(self):
        return str(float(self.vectors[0, 0]))


class Images(Dataset):
    modality, label_names = "image", WORDS

    def load(self, ids):
        return [Example(int(i), Image.new("L", (2, 2))) for i in ids]


@pytest.fixture
def planted():
    """Unit embeddings a·t + √(1−a²)·(other), where latent j is a wherever concept j is."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(N) % 3
    a = torch.rand(N, generator=generator) * 0.9 + 0.05
    vectors = torch.zeros(N, D)
    vectors[torch.arange(N), label] = a
    vectors[:, 7] = (1 - a**2).sqrt()
    f = torch.zeros(N, 4)
    f[torch.arange(N), label] = a
    return f, vectors


def measured(planted, *, seed=0, dataset=None, backend=(), x=None, host=None, **options):
    f, vectors = planted
    host = bare(Tower, vectors=vectors) if host is None else host
    dataset = bare(Images) if dataset is None else dataset
    codes = codes_of(f)
    setting = Setting(dataset, lambda: host, SITE, TokenSelection("all"), weights="an SAE")
    cfg = {
        **CFG,
        "n_bootstrap": 50,
        "n_neurons": 0,
        "backend": {**CFG["backend"], **dict(backend)},
        **options,
    }
    evaluator = EVALUATORS.build(cfg)
    evaluator.check(setting)
    evaluator.start(
        context_of(
            codes, seed=seed, setting=setting, dataset=lambda: dataset, model=lambda: host,
            n_latents=10, **({} if x is None else {"sae": build("topk", x.shape[1], 8)}),
        )
    )  # fmt: skip
    if x is not None:
        ids, zeros = torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64)
        evaluator.update(Rows(x, Latents.from_dense(f), x, ids, zeros, None))
    findings = evaluator.finish()
    assert_publishable(findings)
    return findings, host


def test_planted_concepts_are_named_and_rank_the_images(planted):
    findings, host = measured(planted)
    metrics, columns = findings.metrics["autointerp"], findings.tables["latents"]
    assert columns["explanation"] == ["red apple", "green pear", "blue plum"]
    assert columns["auc"] == [1, 1, 1]
    assert all(rho > 0.9 for rho in columns["spearman"])
    assert metrics["n_scored"] == 3 and metrics["n_dead"] == 1 and metrics["n_labels"] == 3
    assert metrics["margin_mean"] > 0.1
    assert metrics["spearman_mean_shuffled"] < 0
    assert host.n_seen <= N  # Each image once.
    assert any("same model judges" in note.detail for note in findings.notes)


def test_a_latent_that_is_the_likeness_itself_scores_1(planted):
    f, vectors = planted
    only = (torch.arange(N) % 3 == 0).nonzero().flatten()
    # One silent image alone, which is the least like it.
    f = torch.cat([f[only][:, :1], torch.zeros(1, 1)])
    vectors = torch.cat([vectors[only], torch.eye(D)[7:8]])
    findings, _ = measured((f, vectors), n_silent=1)
    (rho,) = findings.tables["latents"]["spearman"]
    assert rho == pytest.approx(1)


def test_a_vocabulary_from_a_file_and_its_hash(planted, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("green pear\n\n fig \nblue plum\ngreen pear\nred_apple\n")
    findings, _ = measured(planted, backend={"vocabulary": str(path)})
    assert findings.tables["latents"]["explanation"] == ["red_apple", "green pear", "blue plum"]
    cfg = {**CFG, "backend": {**CFG["backend"], "vocabulary": str(path)}}
    before = EVALUATORS.build(cfg).reads()
    path.write_text("fig\nnut\n")
    assert EVALUATORS.build(cfg).reads() != before
    findings, _ = measured(planted, backend={"vocabulary": str(path)})
    assert abs(findings.metrics["autointerp"]["auc_mean"] - 0.5) < 0.2  # Of no use here.


def test_several_concepts_explain_together(planted):
    f, _ = planted
    f[:, 0] = f[:, 0] + f[:, 1]  # Latent 0: apples and pears.
    one, _ = measured(planted)
    two, _ = measured(planted, backend={"n_concepts": 2})
    assert set(two.tables["latents"]["explanation"][0].split(" | ")) == {"red apple", "green pear"}
    rho = [found.tables["latents"]["spearman"][0] for found in (one, two)]
    assert rho[1] > rho[0] and rho[1] > 0.9


def test_images_count_by_the_activation():
    """Four strong figs among many weak plums."""
    vectors, f = torch.zeros(400, D), torch.zeros(400, 1)
    vectors[:60, 2], f[:60, 0] = 1.0, 0.01
    vectors[:4], f[:4, 0] = torch.eye(D)[3], 10.0
    vectors[60:, 7] = 1.0
    (label,) = measured((f, vectors))[0].tables["latents"]["explanation"]
    assert label == "fig"


def test_centring_takes_the_cone_of_texts_away():
    """All texts share a direction that images have too: it must name nothing."""
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(N, generator=generator)
    vectors = torch.zeros(N, D)
    vectors[:, 3], vectors[:, 6] = a, -2 * a  # More fig, and less of what all texts share.
    vectors[:, 7] = 3.0
    centred, _ = measured((a[:, None].clone(), vectors), n_silent=1)
    raw, _ = measured((a[:, None].clone(), vectors), n_silent=1, backend={"centre": False})
    assert centred.tables["latents"]["explanation"] == ["fig"]
    assert centred.tables["latents"]["spearman"][0] > 0.9
    assert raw.tables["latents"]["spearman"][0] < 0


def test_concepts_are_embedded_as_classes_are():
    tower = bare(Tower)
    words = [word.replace("_", " ") for word in WORDS] * 60
    found = embed_concepts(tower, words, tower.templates)
    assert torch.allclose(found, tower.class_embeddings(words), atol=1e-6)


def test_explained_and_scored_images_differ_and_the_seed_decides(planted):
    one, other = measured(planted)[0], measured(planted)[0]
    assert one.metrics == other.metrics and one.tables == other.tables
    columns = one.tables["latents"]
    for explain, score in zip(columns["explain_ids"], columns["score_ids"], strict=True):
        assert len(explain) == 15 and len({*explain, *score}) == 55
    assert measured(planted, seed=1)[0].tables != one.tables


def test_what_cannot_be_explained_is_refused(planted, tmp_path):
    unlabelled = bare(Images, label_names=None)
    with pytest.raises(ConfigError, match=r"backend\.vocabulary=null: this dataset names no"):
        measured(planted, dataset=unlabelled)
    with pytest.raises(ConfigError, match=r"absent\.txt: No such file"):
        measured(planted, backend={"vocabulary": str(tmp_path / "absent.txt")})
    (tmp_path / "one.txt").write_text("fig\n")
    with pytest.raises(ConfigError, match="1 concepts are too few"):
        measured(planted, backend={"vocabulary": str(tmp_path / "one.txt")})
    setting = Setting(bare(Images), lambda: bare(Model), SITE, TokenSelection("all"))
    with pytest.raises(ConfigError, match="no text tower"):
        EVALUATORS.build(CFG).check(setting)


def test_numbers_of_frequency(planted):
    columns = measured(planted)[0].tables["latents"]
    np.testing.assert_allclose(columns["freq"], 1 / 3)


def test_a_judge_predicts_and_the_host_explains(planted, monkeypatch):
    """A judge that takes apples for pears finds the host's explanations of both wrong."""
    _, vectors = planted
    swapped = vectors.clone()
    swapped[:, [0, 1]] = vectors[:, [1, 0]]
    judge = bare(Tower, vectors=swapped)
    built = []

    def build(options, device, **_):
        built.append(options["arch"])
        return judge

    monkeypatch.setattr(clip, "build_judge", build)
    findings, host = measured(planted, backend={"judge": "clip_vit_b16"})
    columns = findings.tables["latents"]
    assert columns["explanation"] == ["red apple", "green pear", "blue plum"]
    assert columns["spearman"][0] < 0 and columns["spearman"][1] < 0 < 0.9 < columns["spearman"][2]
    assert set(built) == {"ViT-B-16"} and judge.n_seen and host.n_seen
    assert not [note for note in findings.notes if "same model judges" in note.detail]
    judge.vectors = vectors
    findings, _ = measured(planted, backend={"judge": "clip_vit_b16"})
    assert findings.tables["latents"]["auc"] == [1, 1, 1]
    (note,) = [note for note in findings.notes if "same model judges" in note.detail]
    assert "the host's own weights" in note.detail


@pytest.mark.parametrize(
    ("judge", "line"),
    [
        (
            "clip_vit_b61",
            "judge=clip_vit_b61: is no preset of a model. Did you mean 'clip_vit_b16'",
        ),
        ({"weights": "x"}, "judge=.*: is no preset"),
        ({"preset": "clip_vit_b16", "weight": "x"}, "judge.weight: no such option.*'weights'"),
        ("tiny_clip", "judge=tiny_clip: this model has no weights of its own; use {preset"),
        ("dinov2_b14", "timm model has no text tower"),
        ({"preset": "clip_vit_b16", "weights": "opnai"}, r"^backend.judge.weights=opnai: "),
    ],
)
def test_judges_that_cannot_be(planted, judge, line):
    with pytest.raises(ConfigError, match=line):
        measured(planted, backend={"judge": judge})


def test_a_judge_of_local_weights_is_known_by_them(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"one")
    judge = {"preset": "clip_vit_b16", "weights": str(tmp_path / "a.pt")}
    cfg = {**CFG, "backend": {**CFG["backend"], "judge": judge}}
    before = EVALUATORS.build(cfg).reads()
    assert set(before) == {"judge"} and EVALUATORS.build(cfg).reads() == before
    (tmp_path / "a.pt").write_bytes(b"two")
    assert EVALUATORS.build(cfg).reads() != before
    cfg["backend"]["judge"] = "clip_vit_b16"
    assert EVALUATORS.build(cfg).reads() == {}


def test_neurons_are_explained_by_concepts_too(planted):
    f, _ = planted
    findings, _ = measured(planted, x=f[:, [1, 0, 3]].flip(1), n_neurons=3)
    columns, metrics = findings.tables["neurons"], findings.metrics["autointerp"]
    assert columns["neuron"] == [1, 2]  # The first is never active.
    assert columns["explanation"] == ["red apple", "green pear"]
    assert metrics["n_scored_neurons"] == 2
    assert metrics["spearman_mean_neurons"] == pytest.approx(metrics["spearman_mean"], abs=0.1)
    assert metrics["n_labels"] == 3  # Of the latents.


def test_concepts_of_one_corpus_are_scored_on_another(planted, tmp_path):
    """With the vocabulary that explained, whatever the other's classes are."""
    first, _ = measured(planted, backend={"n_concepts": 2})
    keep(first, tmp_path, host=Tower.fingerprint(bare(Tower, vectors=planted[1])))
    unnamed = bare(Images, label_names=None, fingerprint=lambda _: "other data")
    with pytest.raises(ConfigError, match="this dataset names no classes"):
        measured(planted, dataset=unnamed)
    options = {"explanations": str(tmp_path), "dataset": unnamed, "backend": {"centre": False}}
    second, host = measured(planted, **options)
    one, two = first.tables["latents"], second.tables["latents"]
    assert two["explanation"] == one["explanation"] and " | " in two["explanation"][0]
    assert all(abs(a - b) < 0.1 for a, b in zip(one["spearman"], two["spearman"], strict=True))
    assert two["explain_ids"] == [[], [], []] and host.n_seen <= N
    same = bare(Images, label_names=None, fingerprint=lambda _: "some data")
    third, _ = measured(planted, **{**options, "dataset": same})
    assert third.tables["latents"]["spearman"] == one["spearman"]
    assert third.tables["latents"]["score_ids"] == one["score_ids"]
    path = tmp_path / "autointerp" / "explanations.json"
    path.write_text(path.read_text().replace('"rule": [0', '"rule": [4', 1))
    with pytest.raises(ConfigError, match=r"explanations\.json is damaged: .*is not what its rule"):
        measured(planted, **options)


def test_neurons_of_other_examples_than_the_latents(planted, monkeypatch):
    """Where memory is short, examples of both are numbered apart."""
    monkeypatch.setattr("sae_runner.evaluators._controls.KEEP_BYTES", 1000)
    f, _ = planted
    findings, _ = measured(planted, x=f[:, :2], n_neurons=2)
    columns = findings.tables["neurons"]
    assert columns["explanation"] == ["red apple", "green pear"]
    assert all(rho > 0.8 for rho in columns["spearman"])
