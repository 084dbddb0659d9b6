import numpy as np
import pytest
import torch
from codes_fixtures import bare, codes_of, context_of
from evaluators.conftest import assert_publishable

from sae_runner.config import preset
from sae_runner.data.base import Dataset
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._collecting import CodesCollector
from sae_runner.evaluators.base import Setting
from sae_runner.models.base import SiteInfo
from sae_runner.site import TokenSelection

CFG = preset("evaluators", "top_examples")["top_examples"]
N_EXAMPLES, N_TOKENS, D_SAE = 40, 5, 6
IDS = 10 * torch.arange(N_EXAMPLES) + 3


def setting_of(modality, site, tokens="all") -> Setting:
    dataset = bare(Dataset, modality=modality)
    return Setting(dataset, lambda: pytest.fail("built"), site, TokenSelection(tokens))


IMAGE = SiteInfo("s", "m", 4, "tokens", N_TOKENS, n_prefix=1, has_cls=True, grid=(2, 2))
TEXT = SiteInfo("s", "m", 4, "tokens", None)


@pytest.fixture
def dense():
    f = torch.rand(N_EXAMPLES * N_TOKENS, D_SAE, generator=torch.Generator().manual_seed(0))
    f[f < torch.tensor([0.2, 0.9, 0.99, 0.995, 0.5, 2.0])] = 0
    return f


def found_in(dense, *, codes=None, setting=None, **options):
    evaluator = EVALUATORS.build({**CFG, **options})
    codes = codes_of(dense, N_TOKENS, ids=IDS) if codes is None else codes
    evaluator.start(context_of(codes, setting=setting))
    findings = evaluator.finish()
    assert_publishable(findings)
    return findings


def test_arrays_and_table_say_the_same_and_empty_slots_are_no_example(dense):
    found = found_in(dense, k=7)
    topk, best = found.arrays["topk"], dense.view(N_EXAMPLES, N_TOKENS, D_SAE).amax(1)
    assert topk["id"].shape == (D_SAE, 7)
    assert topk["count"].tolist() == (best > 0).sum(0).clamp_max(7).tolist()
    assert topk["count"][5] == 0 and 0 < topk["count"][3] < 7
    rows = []
    for j in range(D_SAE):
        value, order = best[:, j].sort(descending=True, stable=True)
        n = int(topk["count"][j])
        assert topk["id"][j].tolist() == IDS[order[:n]].tolist() + [-1] * (7 - n)
        assert topk["act"][j].tolist() == value[:n].tolist() + [0] * (7 - n)
        assert topk["position"][j, n:].tolist() == [-1] * (7 - n)
        rows += [(j, r, int(IDS[order[r]]), float(value[r])) for r in range(n)]
    table = found.tables["top"]
    columns = [table[name].tolist() for name in ("feature", "rank", "example", "value")]
    assert list(zip(*columns, strict=True)) == rows
    metrics = found.metrics["top_examples"]
    assert metrics == {"n_examples": N_EXAMPLES, "n_alive": 5, "n_full": 3}


def test_strata_have_silent_examples_beside_them(dense):
    strata, best = found_in(dense).arrays["strata"], dense.view(40, 5, D_SAE).amax(1)
    assert strata["id"].shape == (D_SAE, 11, 5) and strata["count"].shape == (D_SAE, 11)
    assert (strata["count"] == (strata["id"] >= 0).sum(2)).all()
    for j in range(D_SAE):
        ids = strata["silent"][j]
        slots = (ids[ids >= 0] - 3) // 10
        assert (best[slots, j] == 0).all()
        assert len(slots) == min(5, int((best[:, j] == 0).sum()))


@pytest.mark.parametrize(("tokens", "group"), [("all", "strata"), ("patches", "topk")])
def test_heat_is_the_latent_on_the_patches(dense, tokens, group):
    found = found_in(dense, setting=setting_of("image", IMAGE, tokens), heat="all")
    arrays, f = found.arrays[group], dense.view(N_EXAMPLES, N_TOKENS, D_SAE)
    assert arrays["heat"].shape == (*arrays["id"].shape, 4)
    assert torch.equal(arrays["heat_scale"], arrays["act"])
    for place in (arrays["id"] >= 0).nonzero().tolist():
        at = tuple(place)
        acts = f[(int(arrays["id"][at]) - 3) // 10, 1:, at[0]]  # Without the class token.
        shown = arrays["heat"][at].float() / 255 * arrays["heat_scale"][at]
        assert (shown - acts).abs().max() <= arrays["heat_scale"][at] / 255
    assert (arrays["heat"][arrays["id"] < 0] == 0).all()


def test_heat_of_a_text_is_around_the_peak(dense):
    found = found_in(dense, setting=setting_of("text", TEXT), heat="top", radius=2)
    topk, f = found.arrays["topk"], dense.view(N_EXAMPLES, N_TOKENS, D_SAE)
    assert topk["heat"].shape == (D_SAE, 20, 5) and "heat" not in found.arrays["strata"]
    for j, rank in (topk["id"] >= 0).nonzero().tolist():
        at = int(topk["position"][j, rank])
        acts = f[(int(topk["id"][j, rank]) - 3) // 10, :, j]
        wanted = [float(acts[p]) if 0 <= p < N_TOKENS else 0.0 for p in range(at - 2, at + 3)]
        shown = topk["heat"][j, rank].float() / 255 * topk["act"][j, rank]
        np.testing.assert_allclose(shown, wanted, atol=1 / 255)
        assert topk["heat"][j, rank, 2] == 255


def test_no_heat_is_made_of_rows_that_are_whole_examples_or_when_it_is_not_wanted(dense):
    for setting, heat in (
        (setting_of("image", IMAGE, "cls"), "all"),
        (setting_of("text", TEXT, "mean"), "top"),
        (setting_of("image", IMAGE), "none"),
        (None, "all"),
    ):
        assert "heat" not in found_in(dense, setting=setting, heat=heat).arrays["topk"]


def test_histograms_count_every_row(dense):
    hist = found_in(dense).arrays["hist"]
    assert hist["counts"].shape == (D_SAE, 64) and hist["edges"].shape == (65,)
    assert torch.equal(hist["counts"].sum(1) + hist["n_zero"], torch.full((D_SAE,), 200))
    edges = hist["edges"].double().numpy()
    for j in range(D_SAE):
        values = dense[:, j][dense[:, j] > 0].double().numpy()
        edges[0], edges[-1] = 0, 2  # Rounding of the outermost.
        wanted = np.histogram(values, edges)[0]
        assert np.abs(wanted - hist["counts"][j].numpy()).sum() <= 2


def test_batches_and_order_change_no_array(dense):
    codes = codes_of(dense, N_TOKENS, ids=IDS, batch=9, order_seed=8)
    options = {"setting": setting_of("image", IMAGE), "heat": "all"}
    one, other = found_in(dense, **options), found_in(dense, codes=codes, **options)
    for group, arrays in one.arrays.items():
        for name, array in arrays.items():
            assert torch.equal(array, other.arrays[group][name]), (group, name)


def test_no_rows_are_no_arrays():
    codes = CodesCollector(1, 0).finish()
    assert found_in(None, codes=codes).metrics["top_examples"]["n_examples"] == 0


def test_examples_that_did_not_fit_are_told(dense):
    codes = codes_of(dense, N_TOKENS, ids=IDS)
    codes.n_left_out = 9
    (note,) = found_in(dense, codes=codes).notes
    assert "9 examples were left out" in note.detail and "eval.keep_gb" in note.detail
