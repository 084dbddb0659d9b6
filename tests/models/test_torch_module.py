import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sae_runner.config import config_dir
from sae_runner.data import build_dataset
from sae_runner.data.base import Dataset, Example, Split, Unreadable
from sae_runner.data.digits import Digits
from sae_runner.errors import ConfigError, Interrupted
from sae_runner.models import build_model
from sae_runner.models.torch_module import CONSTRUCTORS, TorchModule, constructor

FAST = {"image_size": 8, "epochs": 12, "options": {"widths": [96, 48]}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small lose by sharing their work."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def digits(**changes: Any) -> Digits:
    options = {"heldout": 0.2, "n_examples": None, "n_heldout": None, "seed": 0, **changes}
    dataset = build_dataset({"type": "digits", **options})
    assert isinstance(dataset, Digits)
    return dataset


def config(**changes: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    cfg: Any = OmegaConf.to_container(OmegaConf.load(f"{config_dir()}/model/mnist_mlp.yaml"))
    del cfg["defaults"]
    return {**cfg, **FAST, **changes}


def build(
    outputs: Path, dataset: Dataset | None, meta: bool = False, **changes: Any
) -> TorchModule:
    cpu = torch.device("cpu")
    host = build_model(config(**changes), device=cpu, dataset=dataset, outputs=outputs, meta=meta)
    assert isinstance(host, TorchModule)
    return host


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def host(outputs: Path) -> TorchModule:
    return build(outputs, digits())


def examples(dataset: Dataset, split: Split, n: int | None = None) -> list[Example]:
    found = dataset.load(dataset.ids(split)[:n])
    return [example for example in found if isinstance(example, Example)]


def test_it_trains_to_the_accuracy_that_it_claims(host: TorchModule) -> None:
    for split, key in (("heldout", "heldout"), ("train", "train")):
        found = examples(digits(), split)  # type: ignore[arg-type]
        inputs = host.prepare(found)
        guess = host.forward(inputs).argmax(1)
        accuracy = np.mean([int(g) == e.label for g, e in zip(guess, found, strict=True)])
        assert host.facts[key]["accuracy"] == pytest.approx(accuracy)
        assert host.facts[key]["n"] == len(found)
        assert accuracy > 0.93
    labels = [e.label for e in examples(digits(), "heldout")]
    commonest = max(labels.count(c) for c in range(10)) / len(labels)
    assert host.facts["heldout"]["commonest_class"] == pytest.approx(commonest)


def test_a_stopped_training_goes_on_to_the_same_bits(
    host: TorchModule, tmp_path: Path, stop_at: Any
) -> None:
    with stop_at(9), pytest.raises(Interrupted, match="stopped at step 9 of"):
        build(tmp_path, digits())
    assert build(tmp_path, digits()).fingerprint() == host.fingerprint()


def test_labels_at_random_cannot_be_learned(tmp_path: Path) -> None:
    """Accuracy above chance on held-out images here would be a leak."""
    dataset = digits()
    dataset.labels = np.random.default_rng(0).permutation(dataset.labels)
    host = build(tmp_path, dataset, epochs=6)
    assert host.facts["heldout"]["accuracy"] < 0.2
    assert host.facts["train"]["accuracy"] > host.facts["heldout"]["accuracy"]


def test_it_trains_on_the_training_split_alone(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watched(Digits):
        def load(self, ids: Any) -> list[Example | Unreadable]:
            seen.extend(int(i) for i in ids)
            return super().load(ids)

    dataset = Watched(heldout=0.2, n_examples=300, n_heldout=50, seed=0)
    build(tmp_path, dataset, epochs=1)
    assert sorted(seen[:300]) == dataset.ids("train").tolist()
    assert len(seen) == len(set(seen)) == 350


def test_it_is_trained_once_and_the_same_anywhere(outputs: Path, host: TorchModule,
                                                  tmp_path: Path) -> None:  # fmt: skip
    files = sorted((outputs / "models").glob("*/*"))
    times = [file.stat().st_mtime_ns for file in files]
    assert [file.name for file in files] == ["facts.json", "weights.safetensors"]
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    assert build(outputs, digits()).fingerprint() == host.fingerprint()
    assert [file.stat().st_mtime_ns for file in files] == times
    assert build(tmp_path, digits()).fingerprint() == host.fingerprint()
    assert torch.equal(torch.rand(2), expected)
    facts = json.loads(files[0].read_text())
    assert facts["identity"]["network"]["options"] == {"widths": [96, 48]}
    assert host.describe()["heldout"] == facts["heldout"]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"epochs": 1}, {"options": {"widths": [32]}}, {"mean": [0.5]}, {"dataset": 0}],
)
def test_what_decides_the_weights_names_the_folder(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def stop(outputs: Path, name: str, identity: Any, train: Any) -> None:
        names.append(json.dumps(identity, sort_keys=True))
        raise InterruptedError

    monkeypatch.setattr("sae_runner.models.torch_module.trained", stop)
    for changes in ({}, change):
        dataset = digits(seed=1) if "dataset" in changes else digits()
        options = {k: v for k, v in changes.items() if k != "dataset"}
        with pytest.raises(InterruptedError):
            build(tmp_path, dataset, **options)
    assert names[0] != names[1]


def test_sites_hold_what_the_layers_give(host: TorchModule) -> None:
    sites = host.sites()
    assert [(s.name, s.d, s.kind) for s in sites.values()] == [
        ("hidden.0", 96, "vector"), ("hidden.1", 48, "vector"), ("pooled", 48, "vector"),
        ("logits", 10, "vector"),
    ]  # fmt: skip
    inputs = host.prepare(examples(digits(), "heldout", 5))
    network: Any = host.network
    first = torch.relu(inputs.tensors["pixels"].flatten(1) @ network.hidden[0].linear.weight.T
                       + network.hidden[0].linear.bias)  # fmt: skip
    second = torch.relu(first @ network.hidden[1].linear.weight.T + network.hidden[1].linear.bias)
    found = host.record(inputs, list(sites))
    torch.testing.assert_close(found["hidden.0"].squeeze(1), first)
    torch.testing.assert_close(found["hidden.1"].squeeze(1), second)
    assert torch.equal(found["pooled"], found["hidden.1"])
    assert torch.equal(found["logits"].squeeze(1), host.forward(inputs))


def test_splice_and_resume(host: TorchModule) -> None:
    inputs = host.prepare(examples(digits(), "heldout", 4))
    output, network = host.forward(inputs), host.network
    for site in host.sites():
        x = host.record(inputs, [site])[site]
        assert torch.equal(host.splice(inputs, {site: lambda x: x}), output)
        edited = x * 2 + 1
        spliced = host.splice(inputs, {site: lambda x: x * 2 + 1})
        assert not torch.allclose(spliced, output)
        assert torch.equal(host.resume_from(site, edited, inputs), spliced)
        several = torch.stack([x, edited], 1).flatten(0, 1)
        both = host.resume_from(site, several, inputs).unflatten(0, (4, 2))
        torch.testing.assert_close(both[:, 1], spliced)
    x = host.record(inputs, ["pooled"])["pooled"]
    spliced = host.splice(inputs, {"pooled": lambda x: 3 * x})
    torch.testing.assert_close(spliced, network.head(3 * x.squeeze(1)))  # type: ignore[operator]


def test_pixels_are_scaled_resized_and_normalised(tmp_path: Path) -> None:
    grey = build(tmp_path, digits(), weights="random", image_size=4, mean=[0.25], std=[0.5])
    image = Image.fromarray(np.full((9, 7), 51, np.uint8))
    inputs = grey.prepare([Example(3, image, 1), Example(4, image.convert("RGB"))])
    expected = torch.full((2, 1, 4, 4), (0.2 - 0.25) / 0.5)
    torch.testing.assert_close(inputs.tensors["pixels"], expected)
    assert inputs.labels is not None and inputs.labels.tolist() == [1, -1]
    colour = build(tmp_path, digits(), weights="random", image_size=2, channels=3,
                   mean=[0.0, 0.0, 0.0], std=[1.0, 0.5, 1.0])  # fmt: skip
    pixel = np.zeros((2, 2, 3), np.uint8)
    pixel[0, 1] = (255, 51, 0)
    found = colour.prepare([Example(0, Image.fromarray(pixel))]).tensors["pixels"]
    torch.testing.assert_close(found[0, :, 0, 1], torch.tensor([1.0, 0.4, 0.0]))
    assert found.sum().item() == pytest.approx(1.4)


def test_weights_may_be_given(host: TorchModule, outputs: Path, tmp_path: Path,
                              caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    folder = next(p for p in (outputs / "models").iterdir() if p.is_dir())
    with caplog.at_level(logging.WARNING, "sae_runner"):
        again = build(tmp_path, digits(), weights=str(folder))
        assert not caplog.records
        other = build(tmp_path, digits(seed=5), weights=str(folder / "weights.safetensors"))
    assert again.fingerprint() == other.fingerprint() == host.fingerprint()
    assert "may have been trained on" in caplog.text
    assert build(tmp_path, None, weights=str(folder)).n_classes == 10
    assert not (tmp_path / "models").exists()
    one, two = (build(tmp_path, digits(), weights="random", seed=s) for s in (1, 2))
    assert one.fingerprint() != two.fingerprint()
    with pytest.raises(ConfigError, match=r"^model\.weights=.* has shape [^\n]*$"):
        build(tmp_path, digits(), weights=str(folder), options={"widths": [10, 10]})


def test_a_number_of_classes_that_goes_with_nothing_is_refused(
    host: TorchModule, outputs: Path, tmp_path: Path
) -> None:
    folder = next(p for p in (outputs / "models").iterdir() if p.is_dir())
    with pytest.raises(ConfigError, match=r"^model\.n_classes=9: dataset 'digits' has 10; set it"):
        build(tmp_path, digits(), n_classes=9)
    with pytest.raises(ConfigError, match=r"^model\.n_classes=11: these weights are for 10$"):
        build(tmp_path, digits(), n_classes=11, weights=str(folder))
    assert build(tmp_path, digits(), n_classes=None, meta=True).n_classes == 10
    assert build(tmp_path, digits(), n_classes=11, meta=True).n_classes == 11


def test_shapes_are_learned_without_training(host: TorchModule, tmp_path: Path) -> None:
    bare = build(tmp_path, digits(), meta=True)
    assert bare.sites() == host.sites()
    assert not list(tmp_path.iterdir())


def test_another_module_with_maps_and_dropout(tmp_path: Path) -> None:
    @constructor("test_conv")
    def conv(channels: int, n_classes: int, *, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
            nn.LazyLinear(n_classes) if width == 0 else nn.Linear(64 * width, n_classes),
        )  # fmt: skip

    try:
        options: dict[str, Any] = {
            "constructor": "test_conv", "options": {"width": 6}, "epochs": 1,
            "taps": {
                "stages.0": {"module": "1", "side": "output", "layout": "NCHW"},
                "logits": {"module": "4", "side": "output", "layout": "ND"},
            },
        }  # fmt: skip
        host = build(tmp_path / "a", digits(n_examples=200), **options)
        torch.manual_seed(123)
        again = build(tmp_path / "b", digits(n_examples=200), **options)
    finally:
        del CONSTRUCTORS["test_conv"]
    assert host.fingerprint() == again.fingerprint()
    info = host.sites()["stages.0"]
    assert (info.kind, info.d, info.grid) == ("map", 6, (8, 8))
    inputs = host.prepare(examples(digits(), "heldout", 3))
    raw = host.network[:2](inputs.tensors["pixels"])  # type: ignore[index]
    x = host.record(inputs, ["stages.0"])["stages.0"]
    assert torch.equal(x[:, 8 * 2 + 5], raw[:, :, 2, 5])
    assert torch.equal(host.resume_from("stages.0", x, inputs), host.forward(inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constructor": "mnist_mpl"}, r"model\.constructor=mnist_mpl.* Did you mean 'mnist_mlp'"),
        ({"options": {"width": [3]}}, r"no key 'model\.options\.width'.* Did you mean 'widths'"),
        ({"options": {"widths": [0]}}, r"model\.options\.widths=0: must be > 0"),
        ({"options": {"widths": []}}, r"model\.options\.widths=\[\]: at least one"),
        ({"std": [0.0]}, r"model\.std=0\.0: must be > 0"),
        ({"mean": [0.1, 0.2]}, r"model\.mean=\[0\.1, 0\.2\]: model\.channels=1"),
        ({"taps": {}}, r"model\.taps is empty"),
        ({"taps": {"a": {"module": "head"}}}, r"'model\.taps\.a\.side' needs a value"),
        (
            {"taps": {"a": {"module": "head", "side": "output", "layout": "NHW"}}},
            r"model\.taps\.a\.layout=NHW.*Did you mean 'NHWC'",
        ),
        (
            {"taps": {"a.{i}": {"module": "hide.{i}", "side": "output", "layout": "ND"}}},
            r"model\.taps\.a\.\{i\}\.module=hide\.\{i\}: the network has none",
        ),
        ({"weights": "nowhere"}, r"model\.weights=nowhere: no file"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(tmp_path, digits(), **changes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_labels_there_is_nothing_to_learn(tmp_path: Path) -> None:
    class Bare(Digits):
        label_names = None  # type: ignore[assignment]

        def load(self, ids: Any) -> list[Example | Unreadable]:
            return [e._replace(label=None) for e in super().load(ids) if isinstance(e, Example)]

    bare = Bare(heldout=0.2, n_examples=None, n_heldout=None, seed=0)
    with pytest.raises(ConfigError, match=r"model\.n_classes=null: dataset 'digits' has no"):
        build(tmp_path, bare, n_classes=None)
    with pytest.raises(ConfigError, match=r"model\.weights=null trains on labels"):
        build(tmp_path, bare, n_classes=10)
    with pytest.raises(ConfigError, match=r"model\.weights=null: a dataset is needed"):
        build(tmp_path, None, n_classes=10)


def test_the_yaml_as_it_stands_learns_digits(tmp_path: Path) -> None:
    cfg = config(image_size=28, epochs=10, options={"widths": [512, 256]})
    host = build_model(cfg, device="cpu", dataset=digits(), outputs=tmp_path)
    assert isinstance(host, TorchModule)
    assert host.sites()[cfg["site"]].d == 256
    assert host.facts["heldout"]["accuracy"] > 0.95


@pytest.mark.data
def test_mnist_is_learned(tmp_path: Path, data_dir: Path) -> None:
    """One epoch of the shipped network on real MNIST, read without the image dataset's class."""
    import io

    import pyarrow.parquet as pq

    class Mnist(Digits):
        name = "mnist"

        def __init__(self) -> None:
            self.heldout, self.seed = 0.2, 0
            self.limits: dict[Split, int | None] = {"train": None, "heldout": None}
            table = pq.read_table(data_dir / "mnist" / "test.parquet").to_pylist()
            decoded = [np.array(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in table]
            self.pixels = np.stack(decoded)
            self.labels = np.array([row["label"] for row in table])

    host = build(tmp_path, Mnist(), image_size=28, epochs=3, options={"widths": [512, 256]})
    assert host.facts["train"]["n"] == 8000
    assert host.facts["heldout"]["accuracy"] > 0.93
