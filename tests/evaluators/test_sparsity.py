import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_runner.config import config_dir
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators import sparsity as module

CFG = {"type": "sparsity", "active_eps": 0.0, "n_bootstrap": 0}


def random_latents(n, d_sae, seed=0):
    """Rows of very different L0."""
    rng = np.random.default_rng(seed)
    active = rng.random((n, d_sae)) < rng.random((n, 1)) ** 2
    return (active * rng.exponential(1, (n, d_sae))).astype(np.float32)


def test_metrics_are_those_of_dense_numpy(measure):
    rng = np.random.default_rng(1)
    f, x = random_latents(500, 40), rng.normal(size=(500, 6)).astype(np.float32)
    W_dec = torch.from_numpy(rng.normal(size=(40, 6)).astype(np.float32))
    found = measure(CFG, x, latents=f, W_dec=W_dec, batch=7).metrics["sparsity"]
    l0, l1 = (f > 0).sum(1), f.astype(np.float64).sum(1)
    assert found["l0"] == pytest.approx(l0.mean(), rel=1e-12)
    for q in (5, 50, 95):
        assert found[f"l0_p{q:02}"] == pytest.approx(np.percentile(l0, q), rel=1e-12)
    assert found["l0_max"] == l0.max()
    assert found["l0_frac"] == pytest.approx(l0.mean() / 40, rel=1e-12)
    assert found["l1"] == pytest.approx(l1.mean(), rel=1e-12)
    norms = np.linalg.norm(W_dec.double().numpy(), axis=1)
    assert found["l1_dec"] == pytest.approx((f * norms).sum(1).mean(), rel=1e-12)
    over_norm = l1 / np.linalg.norm(x.astype(np.float64), axis=1)
    assert found["l1_over_norm"] == pytest.approx(over_norm.mean(), rel=1e-12)
    assert found["l1_over_norm_skipped"] == 0


def test_topk_latents_have_l0_k_without_spread(measure):
    f = torch.rand(200, 64)
    f = torch.where(f >= f.topk(5).values[:, -1:], f, 0)
    found = measure({**CFG, "n_bootstrap": 100}, torch.ones(200, 2), latents=f)
    metrics = found.metrics["sparsity"]
    assert {metrics[k] for k in ("l0", "l0_p05", "l0_p50", "l0_p95", "l0_max")} == {5}
    assert found.ci["sparsity.l0"] == {"se": 0, "lo": 5, "hi": 5, "n": 200}


def test_all_zero_latents(measure):
    metrics = measure(CFG, torch.ones(9, 2), latents=torch.zeros(9, 4)).metrics["sparsity"]
    assert {metrics[k] for k in ("l0", "l0_p95", "l0_max", "l1", "l1_dec")} == {0}


def test_rescaling_latents_against_the_decoder(measure):
    f, x, W_dec = torch.from_numpy(random_latents(50, 8)), torch.randn(50, 3), torch.randn(8, 3)
    before = measure(CFG, x, latents=f, W_dec=W_dec).metrics["sparsity"]
    after = measure(CFG, x, latents=4 * f, W_dec=W_dec / 4).metrics["sparsity"]
    assert after["l1"] == pytest.approx(4 * before["l1"])
    assert after["l1_dec"] == pytest.approx(before["l1_dec"])
    assert after["l0"] == before["l0"]


def test_folding_the_input_scale_changes_only_l1(measure):
    f, x, W_dec = torch.from_numpy(random_latents(50, 8)), torch.randn(50, 3), torch.randn(8, 3)
    scaled = measure(CFG, x, latents=f, W_dec=W_dec, input_scale=4.0).metrics["sparsity"]
    folded = measure(CFG, x, latents=f / 4, W_dec=W_dec).metrics["sparsity"]
    assert scaled.pop("l1") == pytest.approx(4 * folded.pop("l1"))
    assert scaled == pytest.approx(folded)


def test_active_eps_leaves_small_latents_out_of_l0_but_not_of_l1(measure):
    f = torch.tensor([[0.5, 0.1, 0.0], [-0.7, 0.25, 0.3]])
    found = measure({**CFG, "active_eps": 0.25}, torch.ones(2, 1), latents=f).metrics["sparsity"]
    assert found["l0"] == 1.5  # 0.25 is not above 0.25.
    assert found["l1"] == pytest.approx(0.925)


def test_rows_of_zero_norm_are_skipped_and_counted(measure):
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    found = measure(CFG, x, latents=torch.tensor([[9.0, 0], [10.0, 5]]))
    assert found.metrics["sparsity"]["l1_over_norm"] == 3
    assert found.metrics["sparsity"]["l1_over_norm_skipped"] == 1
    assert [n.metric for n in found.notes] == ["sparsity.l1_over_norm"]
    nothing = measure(CFG, torch.zeros(2, 2))
    assert nothing.metrics["sparsity"]["l1_over_norm"] is None


def images(n_images, n_tokens, d_sae, seed=0):
    ids = np.repeat(np.arange(n_images) * 3 + 5, n_tokens)
    position = np.tile(np.arange(n_tokens), n_images)
    return ids, position, random_latents(len(ids), d_sae, seed)


@pytest.mark.parametrize("batch", [1, 7, 10**6])
def test_parts_of_images(measure, batch):
    ids, position, f = images(11, 6, 30)
    order = np.random.default_rng(7).permutation(len(ids))
    found = measure(
        {**CFG, "active_eps": 0.5}, np.ones((len(ids), 2)), latents=f, example_id=ids,
        position=position, order=order, batch=batch, has_cls=True, n_prefix=2,
    ).metrics["sparsity"]  # fmt: skip
    active = f > 0.5
    assert found["l0_cls"] == pytest.approx(active[position == 0].sum(1).mean())
    assert found["l0_patch"] == pytest.approx(active[position >= 2].sum(1).mean())
    distinct = active.reshape(11, 6, 30).any(1).sum(1)
    assert found["l0_image"] == pytest.approx(distinct.mean())
    assert found["l0_image_n"] == 11


def test_few_of_many_images(measure):
    """As under a limit: fewer rows than there are images, and yet all rows of each that came."""
    ids, position, f = images(3, 6, 30)
    found = measure(
        CFG, np.ones((18, 2)), latents=f, example_id=ids, position=position, has_cls=True,
        n_prefix=1, examples=np.union1d(np.arange(1000), ids),
    ).metrics["sparsity"]  # fmt: skip
    distinct = (f > 0).reshape(3, 6, 30).any(1).sum(1)
    assert found["l0_image"] == pytest.approx(distinct.mean()) and found["l0_image_n"] == 3


def test_text_and_pooled_rows_have_no_parts(measure):
    ids, position, f = images(5, 4, 8)
    text = measure(CFG, np.ones((20, 2)), latents=f, example_id=ids, position=position)
    assert not {"l0_cls", "l0_patch", "l0_image"} & text.metrics["sparsity"].keys()
    pooled = measure(CFG, np.ones((20, 2)), latents=f, has_cls=True, n_prefix=1)
    assert not {"l0_cls", "l0_patch", "l0_image"} & pooled.metrics["sparsity"].keys()


def test_patches_alone_have_a_null_for_the_class_token(measure):
    ids, position, f = images(5, 4, 8)
    found = measure(
        CFG, np.ones((20, 2)), latents=f, example_id=ids, position=position + 1, has_cls=True,
        n_prefix=1,
    )  # fmt: skip
    assert found.metrics["sparsity"]["l0_cls"] is None
    assert found.metrics["sparsity"]["l0_patch"] == found.metrics["sparsity"]["l0"]


def test_distinct_latents_of_a_sample_where_memory_does_not_suffice(measure, monkeypatch):
    monkeypatch.setattr(module, "SEEN_BYTES", 30 * 40)
    ids, position, f = images(300, 3, 30, seed=3)
    run = {"example_id": ids, "position": position, "has_cls": True, "n_prefix": 1, "latents": f}
    found = measure(CFG, np.ones((900, 2)), **run).metrics["sparsity"]
    assert found["l0_image_n"] == 40
    distinct = (f > 0).reshape(300, 3, 30).any(1).sum(1)
    chosen = np.random.default_rng(0).choice(300, 40, replace=False)
    assert found["l0_image"] == pytest.approx(distinct[chosen].mean())


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_batches_and_order_do_not_matter(measure, batch):
    f, x = random_latents(300, 20), torch.randn(300, 3)
    ids = np.random.default_rng(2).integers(0, 30, 300)
    order = np.random.default_rng(3).permutation(300)
    cfg = {**CFG, "n_bootstrap": 50}
    whole = measure(cfg, x, latents=f, example_id=ids)
    split = measure(cfg, x, latents=f, example_id=ids, batch=batch, order=order)
    assert split.metrics["sparsity"] == pytest.approx(whole.metrics["sparsity"], rel=1e-12)
    for name, interval in whole.ci.items():
        assert split.ci[name] == pytest.approx(interval, rel=1e-9)


def test_intervals_are_over_examples(measure):
    # All 10 rows of an example are the same: what counts is 40 examples, not 400 rows.
    per_example = random_latents(40, 30, seed=4)
    f, ids = np.repeat(per_example, 10, axis=0), np.repeat(np.arange(40), 10)
    cfg = {**CFG, "n_bootstrap": 2000}
    ci = measure(cfg, np.ones((400, 1)), latents=f, example_id=ids).ci
    for name, values in (("l0", (per_example > 0).sum(1)), ("l1", per_example.sum(1))):
        found = ci[f"sparsity.{name}"]
        assert found["n"] == 40
        assert found["se"] == pytest.approx(values.std() / np.sqrt(40), rel=0.06)
        assert found["lo"] < values.mean() < found["hi"]


def test_no_rows_and_values_that_are_not_finite_are_nulls_with_notes(measure):
    empty = measure({**CFG, "n_bootstrap": 100}, torch.ones(0, 2), latents=torch.zeros(0, 4))
    assert empty.metrics["sparsity"]["l0"] is None
    assert empty.metrics["sparsity"]["l1"] is None
    diverged = measure(CFG, torch.ones(2, 2), latents=torch.tensor([[torch.nan, 1], [1, 1]]))
    assert diverged.metrics["sparsity"]["l1"] is None
    assert any("1 latent values are not finite" in note.detail for note in diverged.notes)


def test_quantile_of_a_histogram():
    values = np.array([0, 0, 3, 3, 3, 7])
    histogram = torch.from_numpy(np.bincount(values, minlength=9))
    for q in np.linspace(0, 1, 21):
        assert module.quantile(histogram, q) == pytest.approx(np.quantile(values, q))


def test_too_few_resamples_are_refused(measure):
    with pytest.raises(ConfigError, match=r"evaluators\.sparsity\.n_bootstrap=3"):
        measure({**CFG, "n_bootstrap": 3}, torch.ones(2, 2))


def test_the_yaml_has_every_option():
    cfg = OmegaConf.load(f"{config_dir()}/evaluators/sparsity.yaml")["sparsity"]
    assert EVALUATORS.build(cfg).n_bootstrap == 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_on_a_gpu(measure):
    f, x = random_latents(300, 20), torch.randn(300, 4)
    ids, position = np.repeat(np.arange(100), 3), np.tile(np.arange(3), 100)
    run = {"latents": f, "example_id": ids, "position": position, "has_cls": True, "n_prefix": 1}
    here, there = (measure(CFG, x, **run, batch=64, device=device) for device in ("cpu", "cuda"))
    assert there.metrics["sparsity"] == pytest.approx(here.metrics["sparsity"], rel=1e-12)


def test_l0_histogram_is_what_the_figure_draws():
    import numpy as np
    import torch

    from sae_runner.config import preset
    from sae_runner.evaluators.base import EvalContext, Rows
    from sae_runner.evaluators.sparsity import Sparsity
    from sae_runner.saes import SAES
    from sae_runner.saes._latents import Latents

    options = {"d_sae": 4, "expansion": None, "k": 2, "input_scaling": "none"}
    sae = SAES.build(preset("sae", "topk") | options, d_in=2)
    acts = torch.tensor([[1.0, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 3, 4, 0]])
    ids = torch.arange(4)
    evaluator = Sparsity(active_eps=0.0, n_bootstrap=0)
    evaluator.start(EvalContext(sae, 4, np.arange(4), 0))
    x = torch.ones(4, 2)
    evaluator.update(
        Rows(x, Latents.from_dense(acts), x, ids, torch.zeros(4, dtype=torch.int64), None)
    )
    found = evaluator.finish()
    assert found.series["l0_histogram"] == {"l0": [0, 1, 2], "counts": [1, 1, 2]}
