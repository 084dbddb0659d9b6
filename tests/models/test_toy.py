import numpy as np
import pytest
import torch

from sae_runner.config import config_dir
from sae_runner.data import build_dataset
from sae_runner.data.base import Dataset, Example
from sae_runner.data.toy import ToyDataset
from sae_runner.errors import ConfigError
from sae_runner.models import build_model
from sae_runner.models.base import Inputs, Model
from sae_runner.models.toy import ToyHost


def toy_dataset() -> Dataset:
    from omegaconf import OmegaConf

    return build_dataset(OmegaConf.load(f"{config_dir()}/dataset/toy.yaml"))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return toy_dataset()


@pytest.fixture(scope="module")
def host(dataset: Dataset) -> Model:
    return build_model({"type": "toy", "site": "activations"}, device=torch.device("cpu"),
                       dataset=dataset)  # fmt: skip


@pytest.fixture
def batch(dataset: Dataset, host: Model) -> Inputs:
    examples = [e for e in dataset.load([7, 3, 11, 2]) if isinstance(e, Example)]
    return host.prepare(examples)


def test_it_has_one_site_of_the_rows_width(host: Model) -> None:
    (site,) = host.sites().values()
    assert (site.name, site.d, site.kind, site.n_tokens) == ("activations", 64, "vector", 1)


def test_the_site_holds_the_rows_themselves(dataset: Dataset, host: Model, batch: Inputs) -> None:
    assert batch.ids.tolist() == [7, 3, 11, 2]
    x = host.record(batch, ["activations"])["activations"]
    assert torch.equal(x, dataset.rows([7, 3, 11, 2]).unsqueeze(1))


def test_splice_puts_its_edit_out_where_positions_say(host: Model, batch: Inputs) -> None:
    rows = batch.tensors["rows"]
    assert torch.equal(host.splice(batch, {"activations": lambda x: x}), rows)
    where = torch.tensor([[True], [False], [True], [False]])
    changed = host.splice(batch, {"activations": lambda x: -x}, where)
    assert torch.equal(changed, torch.where(where, -rows, rows))


def test_resume_takes_several_edits_of_one_row(host: Model, batch: Inputs) -> None:
    x = torch.randn(8, 1, 64)
    assert torch.equal(host.resume_from("activations", x, batch), x.squeeze(1))


def test_other_data_is_refused() -> None:
    class Pictures(ToyDataset):
        modality = "image"
        name = "pictures"

        def __init__(self) -> None:
            pass

    with pytest.raises(ConfigError, match=r"model\.type=toy reads rows .* 'pictures' has image"):
        ToyHost(torch.device("cpu"), Pictures())


def test_prepare_keeps_ids_and_values(host: Model) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    inputs = host.prepare([Example(4, values[0]), Example(9, values[1])])
    assert inputs.ids.tolist() == [4, 9]
    assert torch.equal(inputs.tensors["rows"], torch.from_numpy(values))
