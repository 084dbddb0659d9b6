import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from sae_runner.config import config_dir
from sae_runner.data import build_dataset
from sae_runner.data.base import Dataset, Example, split_ids
from sae_runner.errors import ConfigError, Interrupted, StoreError
from sae_runner.models import build_model
from sae_runner.models._contrastive import WordTokenizer, contrastive_loss, shifted
from sae_runner.models._image_pairs import to_bytes, to_normal
from sae_runner.models.tiny_clip import TinyCLIP
from sae_runner.site import TokenSelection, resolve_sites

NAMES = ("red", "green", "blue")


class Colours(Dataset):
    """Noisy pictures of three colours."""

    modality, name = "image", "colours"

    def __init__(self, n=90, labelled=True, captioned=False, seed=0):
        self.n, self.labelled, self.captioned, self.seed = n, labelled, captioned, seed
        self.label_names = NAMES if labelled else None
        self.loaded: list[int] = []

    def ids(self, split):
        return split_ids(self.n, split, heldout=0.3, seed=self.seed)

    def load(self, ids):
        self.loaded += [int(i) for i in ids]
        return [self.example(int(i)) for i in ids]

    def example(self, i):
        pixels = np.random.default_rng(i).integers(0, 120, (8, 8, 3), dtype=np.uint8)
        pixels[..., i % 3] += 130
        caption = f"a {NAMES[i % 3]} thing" if self.captioned else None
        return Example(i, Image.fromarray(pixels), i % 3 if self.labelled else None, caption)

    def fingerprint(self):
        return f"colours {self.n} {self.labelled} {self.captioned}"


def options(**changes):
    path = Path(config_dir()) / "model" / "tiny_clip.yaml"
    config = yaml.safe_load(path.read_text())
    del config["defaults"]
    small = {
        "image_size": 8, "width": 16, "layers": 2, "heads": 2, "embed_dim": 8, "text_width": 8,
        "text_layers": 1, "epochs": 12, "train_batch": 21, "shift": 0, "learning_rate": 5e-3,
    }  # fmt: skip
    return config | small | changes


def build(outputs, dataset=None, meta=False, **changes) -> TinyCLIP:
    dataset = Colours() if dataset is None else dataset
    device = torch.device("cpu")
    return build_model(
        options(**changes), device=device, dataset=dataset, outputs=Path(outputs), meta=meta
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def trained(outputs):
    return build(outputs)


def folders(outputs) -> list[Path]:
    return sorted(p for p in (Path(outputs) / "models").iterdir() if not p.name.startswith("."))


# -- Training ------------------------------------------------------------------------------------


def test_it_learns_and_says_how_well_on_held_out_images(trained):
    found = trained.describe()["zero_shot"]
    heldout = Colours().ids("heldout")
    assert found == {"accuracy": found["accuracy"], "n": len(heldout), "split": "heldout"}
    assert found["accuracy"] > 0.9

    # The same, by the library's own similarity of one image with one sentence per class.
    examples = Colours().load(heldout)
    with torch.no_grad():
        images = trained.forward(trained.prepare(examples))
        texts = trained.encode_text([f"a photo of a {name}" for name in NAMES])
        guesses = F.cosine_similarity(images[:, None], texts[None], dim=-1).argmax(1)
    right = sum(int(g) == e.label for g, e in zip(guesses, examples, strict=True))
    assert right / len(examples) > 0.9


def test_it_sees_no_held_out_image_before_it_is_measured(tmp_path, monkeypatch):
    dataset, seen = Colours(), []

    def measured(self, dataset, split, templates):
        seen.append((split, list(dataset.loaded)))
        return {"accuracy": 0.0, "n": 0, "split": split}

    monkeypatch.setattr(TinyCLIP, "zero_shot_accuracy", measured)
    build(tmp_path, dataset, epochs=1)
    ((split, loaded),) = seen
    assert split == "heldout"
    assert sorted(loaded) == dataset.ids("train").tolist()


def test_it_is_trained_once_and_read_afterwards(trained, outputs, monkeypatch):
    monkeypatch.setattr(
        "sae_runner.models.tiny_clip.train", lambda *_: pytest.fail("trained again")
    )
    again = build(outputs)
    assert again.fingerprint() == trained.fingerprint()
    assert again.describe() == trained.describe()
    by_path = build(outputs, weights=str(folders(outputs)[0]), width=999_999, heads=1)
    assert by_path.fingerprint() == trained.fingerprint()


def test_the_same_seed_gives_the_same_weights_and_leaves_others_random_numbers(trained, tmp_path):
    state = torch.get_rng_state()
    again = build(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.fingerprint() == trained.fingerprint()
    assert build(tmp_path, seed=1).fingerprint() != trained.fingerprint()


def test_another_split_or_option_is_another_folder(tmp_path):
    build(tmp_path, epochs=1)
    build(tmp_path, Colours(seed=1), epochs=1)
    build(tmp_path, epochs=1, learning_rate=1e-3)
    assert len(folders(tmp_path)) == 3
    assert all(folder.name.startswith("tiny_clip-colours-") for folder in folders(tmp_path))


def test_a_stopped_training_goes_on_to_the_same_bits(trained, tmp_path, stop_at):
    with stop_at(7), pytest.raises(Interrupted, match=r"stopped at step 7 of .* tiny_clip"):
        build(tmp_path)
    again = build(tmp_path)
    assert again.fingerprint() == trained.fingerprint()
    assert again.facts["last_epoch_loss"] == trained.facts["last_epoch_loss"]


def test_captions_without_labels(tmp_path):
    model = build(tmp_path, Colours(labelled=False, captioned=True))
    assert model.describe()["zero_shot"] is None
    assert {"a", "thing", *NAMES} == set(model.words.words)
    examples = Colours().load(Colours().ids("heldout"))
    with torch.no_grad():
        images = model.forward(model.prepare(examples))
        texts = model.encode_text([f"a {name} thing" for name in NAMES])
    guesses = F.cosine_similarity(images[:, None], texts[None], dim=-1).argmax(1)
    assert np.mean([int(g) == e.label for g, e in zip(guesses, examples, strict=True)]) > 0.9


def test_at_most_so_many_images(tmp_path):
    model = build(tmp_path, epochs=1, max_images=30)
    assert model.facts["data"]["n_images"] == 30


# -- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, r"model\.patch_size=3: does not divide model\.image_size=8"),
        ({"heads": 3}, r"model\.heads=3: does not divide model\.width=16"),
        ({"text_heads": 3}, r"model\.text_heads=3: does not divide model\.text_width=8"),
        ({"weights": "nowhere"}, r"model\.weights=nowhere"),
        ({"templates": []}, r"model\.templates=\[\]"),
        ({"templates": ["a photo"]}, r"model\.templates=a photo: .*\{\}"),
    ],
)
def test_options_that_fit_nothing(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_data_with_neither_labels_nor_captions(tmp_path):
    with pytest.raises(ConfigError, match=r"labels or captions.*'colours'.*dataset\.label_column"):
        build(tmp_path, Colours(labelled=False))
    rows = build_dataset(yaml.safe_load((Path(config_dir()) / "dataset" / "toy.yaml").read_text()))
    with pytest.raises(ConfigError, match=r"reads images.*'toy'.*rows"):
        build(tmp_path, rows)


def test_weights_from_another_split_are_warned_of(trained, outputs, caplog):
    with caplog.at_level(logging.WARNING):
        build(outputs, weights=str(folders(outputs)[0]))
        assert caplog.text == ""
        build(outputs, Colours(seed=1), weights=str(folders(outputs)[0]))
    assert "may have been trained on" in caplog.text


def test_damaged_weights_are_refused(tmp_path):
    build(tmp_path, epochs=1)
    (file,) = folders(tmp_path)[0].glob("*.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(StoreError, match="not the bytes"):
        build(tmp_path, epochs=1)


# -- Sites ---------------------------------------------------------------------------------------


def test_meta_has_the_sites_without_training(trained, tmp_path):
    meta = build(tmp_path, meta=True)
    assert meta.sites() == trained.sites()
    assert not (tmp_path / "models").exists()


def test_sites_are_those_of_the_vit(trained):
    info = trained.sites()["blocks.1.resid_post"]
    assert (info.d, info.n_tokens, info.grid, info.has_cls) == (16, 5, (2, 2), True)
    inputs = trained.prepare(Colours().load([0, 1]))
    visual = trained.network.visual
    with torch.no_grad():
        x = trained.record(inputs, ["blocks.1.resid_post"])["blocks.1.resid_post"]
        torch.testing.assert_close(visual.ln_post(x[:, 0]) @ visual.proj, trained.forward(inputs))
        assert torch.equal(
            trained.splice(inputs, {"blocks.0.mlp_out": lambda x: x}), trained.forward(inputs)
        )
        resumed = trained.resume_from("blocks.0.resid_post", torch.zeros(2, 5, 16), inputs)
        spliced = trained.splice(inputs, {"blocks.0.resid_post": torch.zeros_like})
    assert torch.equal(resumed, spliced)


# -- Parts ---------------------------------------------------------------------------------------


def test_the_loss_is_clips_where_every_meaning_is_alone():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 5, 7, generator=generator)
    each = torch.arange(5)
    got = contrastive_loss(images, texts, torch.tensor(3.0), each, each)
    logits = 3 * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    expected = (F.cross_entropy(logits, each) + F.cross_entropy(logits.T, each)) / 2
    torch.testing.assert_close(got, expected)


def test_pairs_that_mean_the_same_are_no_negatives():
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    same = contrastive_loss(
        one, one[:1], torch.tensor(50.0), torch.zeros(2).long(), torch.tensor([0])
    )
    # One text, two images: nothing to tell apart for the images, half each for the text.
    assert same.item() == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_words_are_tokens_and_the_highest_ends_a_text():
    words = WordTokenizer.from_texts(["a cat", "A dog, a fish!"], context_length=5, max_words=3)
    assert words.words == ["a", "cat", "dog"] and words.vocab_size == 5
    tokens = words(["a dog", "a unicorn", "a a a a a a"])
    assert tokens.tolist() == [[1, 3, 4, 0, 0], [1, 4, 0, 0, 0], [1, 1, 1, 1, 4]]


def test_padding_changes_no_text(trained):
    with torch.no_grad():
        alone = trained.encode_text(["red"])
        beside = trained.encode_text(["red", "a photo of a green"])
    torch.testing.assert_close(alone[0], beside[0])


def test_shifting_moves_and_mirrors_whole_images():
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(200, 3, 1, 1)
    assert torch.equal(shifted(pixels, 0, False, torch.Generator()), pixels)
    moved = shifted(pixels, 1, True, torch.Generator().manual_seed(0))
    again = shifted(pixels, 1, True, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)
    padded = F.pad(pixels[:1], (1, 1, 1, 1), mode="replicate")[0, 0]
    windows = {
        tuple(w.flatten().tolist())
        for top in range(3)
        for left in range(3)
        for w in (
            padded[top : top + 4, left : left + 4],
            padded[top : top + 4, left : left + 4].flip(1),
        )
    }
    seen = {tuple(image[0].flatten().tolist()) for image in moved}
    assert seen == windows and len(seen) == 18
    assert torch.equal(moved[:, 0], moved[:, 2])


def test_bytes_keep_every_pixel():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16)
    assert torch.equal(to_bytes(to_normal(levels)), levels)


# -- The shipped configurations ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_clip_cifar"])
def test_the_yaml_builds_and_its_site_takes_its_tokens(name, tmp_path):
    config = yaml.safe_load((Path(config_dir()) / "model" / f"{name}.yaml").read_text())
    (default,) = [entry for entry in config.pop("defaults") if entry != "_self_"]
    assert default["/dataset@_global_.dataset"] in ("digits", "cifar10")
    model = build_model(
        config, device=torch.device("cpu"), dataset=None, outputs=tmp_path, meta=True
    )
    (info,) = resolve_sites(config["site"], model.sites())
    TokenSelection(config["tokens"]).check(info)


@pytest.mark.slow
def test_the_shipped_recipe_reads_digits(tmp_path):
    config = yaml.safe_load((Path(config_dir()) / "model" / "tiny_clip.yaml").read_text())
    digits = yaml.safe_load((Path(config_dir()) / "dataset" / "digits.yaml").read_text())
    del config["defaults"]
    model = build_model(
        config, device=torch.device("cpu"), dataset=build_dataset(digits), outputs=tmp_path,
        meta=False,
    )  # fmt: skip
    assert model.describe()["zero_shot"]["accuracy"] >= 0.9
