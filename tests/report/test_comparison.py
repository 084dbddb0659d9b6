from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_runner.report.comparison import (
    ABSENT,
    comparable_groups,
    compare,
    config_differences,
    frontier,
    higher_is_better,
    letter,
)
from sae_runner.report.pareto import pareto_figure
from sae_runner.report.runs import Run, load_runs

MakeRun = Callable[..., Path]
X, Y = "sparsity.l0", "reconstruction.fvu"


def load(*folders: Path) -> list[Run]:
    runs, damaged = load_runs(folders)
    assert damaged == []
    return runs


def dominated(point: tuple[float, float], points: list[tuple[float, float]]) -> bool:
    return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)


@pytest.mark.parametrize("seed", range(30))
def test_the_frontier_is_what_brute_force_finds(seed: int) -> None:
    # A coarse grid, so that ties in one and in both coordinates are frequent.
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 40))
    points = [(float(a), float(b)) for a, b in rng.integers(0, int(rng.integers(2, 12)), (n, 2))]
    chosen = frontier(points)
    assert sorted(chosen) == [i for i, p in enumerate(points) if not dominated(p, points)]
    assert [points[i] for i in chosen] == sorted(points[i] for i in chosen)


def test_more_is_better_of_some_metrics() -> None:
    for name in (
        "reconstruction.explained_variance_per_token", "reconstruction.cosine",
        "density.alive_frac",
        "recovery.mmcs_true_to_sae", "recovery.f1_firing", "downstream_loss.ce_recovered_zero",
        "probing.sae_test_accuracy", "mine/reconstruction.cosine", "downstream_loss.kl_score_mean",
        "downstream_loss.top1_acc_recon", "downstream_loss.top1_agreement", "zeroshot.acc5_mean",
        "zeroshot.acc_recovered_zero", "zeroshot.embed_cos", "downstream_recon.cosine_mean",
        "human.total_median", "human.alpha_total", "human.superiority_neuron",
        "human.interpretable_frac",
    ):  # fmt: skip
        assert higher_is_better(name), name
    for name in (
        X, Y, "reconstruction.mse", "density.dead_frac", "downstream_loss.kl", "sparsity.l1",
        "downstream_loss.ce_increase", "cosine.l0",
    ):  # fmt: skip
        assert not higher_is_better(name), name


def test_the_frontier_of_runs_follows_the_metrics_directions(make_run: MakeRun) -> None:
    values = {"a": (10, 0.5), "b": (20, 0.8), "c": (30, 0.7), "d": (40, 0.9)}
    runs = load(
        *(
            make_run(name, metrics={X: l0, "reconstruction.explained_variance": ev})
            for name, (l0, ev) in values.items()
        )
    )
    comparison = compare(runs, [], X, "reconstruction.explained_variance")
    (front,) = comparison.fronts
    assert [comparison.runs[i].name for i in front] == ["a", "b", "d"]


def test_a_run_without_a_metric_is_on_no_frontier(make_run: MakeRun) -> None:
    note = {"code": "zero_denominator", "metric": Y, "detail": "constant rows"}
    a = make_run("a", metrics={X: 1.0, Y: None}, notes=[note])
    comparison = compare(load(a, make_run("b", metrics={X: 50.0, Y: 0.2})), [], X, Y)
    assert [[comparison.runs[i].name for i in front] for front in comparison.fronts] == [["b"]]


def test_config_differences_are_told_apart_by_what_they_change() -> None:
    first = {"sae.k": 32, "sae.type": "topk", "device": "cpu", "force": True, "seed": 0}
    second = {"sae.l1": 0.1, "sae.type": "relu", "device": "cuda", "force": False, "seed": 0}
    found = config_differences([first, second])
    assert found.differing == {
        "sae.k": [32, ABSENT], "sae.type": ["topk", "relu"], "sae.l1": [ABSENT, 0.1],
    }  # fmt: skip
    assert found.runtime == {"device": ["cpu", "cuda"], "force": [True, False]}
    assert found.same == {"seed": 0}


def test_how_runs_were_measured_is_no_part_of_what_was_trained() -> None:
    first = {"evaluators.recovery.type": "recovery", "eval.n_rows": 100, "trainer.lr": 1}
    found = config_differences([first, {"eval.n_rows": 200, "trainer.lr": 2}])
    assert list(found.measuring) == ["eval.n_rows"]
    assert list(found.differing) == ["trainer.lr"]


def test_keys_that_follow_from_the_kind_of_sae_make_no_column(make_run: MakeRun) -> None:
    relu = {"sae.type": "relu", "sae.k": None, "sae.l1": 0.1, "sae.norm": "a"}
    runs = load(
        make_run("a", config={"sae.k": 8, "trainer.lr": 1.0}),
        make_run("b", config={"sae.k": 16, "trainer.lr": 1.0}),
        make_run("c", config=relu), make_run("d", config=relu | {"sae.l1": 0.2}),
    )  # fmt: skip
    comparison = compare(runs, [], X, Y)
    assert list(comparison.telling) == ["sae", "sae.k", "sae.l1", "trainer.lr"]
    assert "sae.norm" in comparison.differences.differing
    same_kind = compare(runs[:2], [], X, Y)
    assert list(same_kind.telling) == ["sae.k"]


def test_what_stays_outside_fingerprints_changes_no_number() -> None:
    for key in ("model.batch_size", "trainer.log_every", "store.prefetch", "outputs"):
        found = config_differences([{key: 1}, {key: 2}])
        assert found.runtime == {key: [1, 2]} and found.differing == {}


def test_how_an_sae_was_trained_is_unknown_where_it_was_only_measured() -> None:
    trained = {"trainer.lr": 1, "sae.dead_latents.type": "auxk", "sae.target_l0": 32, "sae.k": 32}
    elsewhere = {"sae.dead_latents.type": "none", "sae.target_l0": None, "sae.k": 16}
    found = config_differences([trained, elsewhere])
    assert found.differing == {"sae.k": [32, 16]}
    assert found.same == {key: trained[key] for key in trained if key != "sae.k"}
    found = config_differences([trained, {**trained, "sae.dead_latents.type": "none"}, elsewhere])
    assert found.differing.keys() == {"sae.dead_latents.type", "sae.k"}
    assert found.differing["sae.dead_latents.type"] == ["auxk", "none", ABSENT]
    found = config_differences([elsewhere, {**elsewhere, "sae.target_l0": 8}])
    assert found.differing == {"sae.target_l0": [None, 8]}


def test_an_absent_key_differs_from_null_and_a_list_is_a_value() -> None:
    found = config_differences([{"a": None, "b": [1, 2]}, {"b": [1, 2]}])
    assert list(found.differing) == ["a"]
    assert found.same == {"b": [1, 2]}


def test_every_key_is_reported_once(make_run: MakeRun) -> None:
    runs = load(make_run("a"), make_run("b", config={"sae.k": 16, "device": "cuda"}))
    found = config_differences([run.config for run in runs])
    parts = [*found.differing, *found.runtime, *found.same]
    assert sorted(parts) == sorted(runs[0].config)
    assert list(found.differing) == ["sae.k"]


def test_expected_numbers_are_no_difference_of_the_config(make_run: MakeRun) -> None:
    expected = [{"metric": Y, "value": 0.1, "low": 0.0, "high": 0.2}]
    runs = load(make_run("a"), make_run("b", config={"expected": expected}))
    assert config_differences([run.config for run in runs]).differing == {}
    assert [v["verdict"] for v in runs[1].verdicts] == ["reproduced"]
    assert runs[0].verdicts == []


F12 = "f" * 12
SITE = {"name": "activations", "module": "", "d": 64, "tokens": "cls"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fingerprints": {"model": "f" * 64}}, f"model weights differ ({F12}; A has {'a' * 12})"),
        ({"fingerprints": {"dataset": "f" * 64}}, f"data differ ({F12}; A has {'b' * 12})"),
        ({"site": SITE}, "site differs (tokens cls; A has tokens all)"),
    ],
)  # fmt: skip
def test_runs_of_another_subject_are_not_comparable(
    make_run: MakeRun, change: dict[str, Any], why: str
) -> None:
    odd = make_run("odd", metrics={X: 1.0, Y: 0.0}, **change)
    comparison = compare(load(odd, make_run("a"), make_run("b")), [], X, Y)
    assert [run.name for run in comparison.runs] == ["a", "b", "odd"]
    assert [group.letter for group in comparison.groups] == ["A", "B"]
    assert comparison.remarks == [f"group B (#3) is not comparable with group A: {why}"]
    # It would dominate everything: it must not, being in another group.
    assert comparison.fronts == [[0, 1], [2]]


def test_a_run_that_was_not_evaluated_is_comparable_where_its_header_names_the_site(make_run):
    header = {"id": "a", "checkpoint": "c", "step": 1, "n_tokens": 2, "site": "activations"}
    bare = make_run("bare", report={"run": header | {"tokens": "all"}, "evaluators": {}})
    other = make_run("other", report={"run": header | {"tokens": "cls"}, "evaluators": {}})
    comparison = compare(load(make_run("a"), bare, other), [], X, Y)
    assert [[comparison.runs[i].name for i in g.runs] for g in comparison.groups] == [
        ["a", "bare"], ["other"],
    ]  # fmt: skip
    figure = pareto_figure(comparison)
    (panel,) = figure.axes
    assert not any("group B" in text.get_text() for text in panel.get_legend().get_texts())


def test_an_evaluator_that_a_run_lacks_measured_nothing_differently():
    found = config_differences([{"evaluators.sparsity.type": "sparsity"}, {"sae.k": 3}])
    assert found.measuring == {} and list(found.differing) == ["sae.k"]


def test_an_unknown_fingerprint_equals_nothing_not_even_another_one(make_run: MakeRun) -> None:
    unknown = {"report": {"fingerprints": {"model": "a" * 64}}}
    runs = load(make_run("a", **unknown), make_run("b", **unknown), make_run("c"), make_run("d"))
    groups = comparable_groups(runs)
    assert [group.runs for group in groups] == [[2, 3], [0], [1]]
    assert groups[1].why == "data of this run is unknown"


def test_another_measurement_of_comparable_runs_is_said(make_run: MakeRun) -> None:
    versions = {"sae_runner": "0.1.0", "python": "3.11.2"}
    runs = load(
        make_run("a"),
        make_run("b", data={"n_heldout": 64}, metrics={"density.n_tokens": 1024}),
        make_run("c", report={"versions": versions | {"torch": "2.11"}}),
    )  # fmt: skip
    remarks = compare(runs, [], X, Y).remarks
    assert remarks == [
        "sparsity, reconstruction, density measured differently: "
        "data.n_heldout is 512 (#1, #3), 64 (#2)",
        "density measured differently: density.n_tokens is 8192 (#1, #3), 1024 (#2)",
        "made by different code: versions.torch is 2.15.0 (#1, #2), 2.11 (#3)",
    ]


def test_what_a_run_warns_of_is_said_once_with_the_runs(make_run: MakeRun) -> None:
    random = {"warnings": ["MODEL WEIGHTS ARE RANDOM"]}
    runs = load(make_run("a", report=random), make_run("b"), make_run("c", report=random))
    assert compare(runs, [X, Y], X, Y).remarks == ["#1, #3: MODEL WEIGHTS ARE RANDOM"]


def test_hashes_are_cut_short(make_run: MakeRun) -> None:
    git = {"commit": "0123456789ab" + "c" * 28, "dirty": False}
    runs = load(make_run("a", report={"git": git}), make_run("b", report={"git": None}))
    assert compare(runs, [], X, Y).remarks == [
        "made by different code: git.commit is 0123456789ab… (#1), absent (#2)",
        "made by different code: git.dirty is False (#1), absent (#2)",
    ]


def test_how_rows_were_batched_is_not_worth_a_remark(make_run: MakeRun) -> None:
    runs = load(make_run("a"), make_run("b"))
    options = runs[0].evaluators["density"]["config"]["eval"]
    options["batch_size"] = 7
    assert compare(runs, [], X, Y).remarks == []
    options["n_rows"] = 7
    (remark,) = compare(runs, [], X, Y).remarks
    assert remark == "density measured differently: config.eval.n_rows is 7 (#1), 8192 (#2)"


def test_what_a_stream_cannot_count_is_not_worth_a_remark(make_run: MakeRun) -> None:
    runs = load(make_run("a"), make_run("b"))
    runs[0].evaluators["density"]["data"]["n_unreadable"] = 0
    assert compare(runs, [], X, Y).remarks == []


def test_runs_are_ordered_by_group_kind_and_x(make_run: MakeRun) -> None:
    runs = load(
        make_run("a", metrics={X: 64.0}), make_run("b", metrics={X: 8.0}),
        make_run("c", config={"sae.type": "relu"}, metrics={X: 99.0}),
    )  # fmt: skip
    assert [run.name for run in compare(runs, [], X, Y).runs] == ["c", "b", "a"]


def test_letters_go_on_after_z() -> None:
    assert [letter(n) for n in (0, 25, 26, 27, 51, 52, 701, 702)] == [
        "A", "Z", "AA", "AB", "AZ", "BA", "ZZ", "AAA",
    ]  # fmt: skip


def test_keys_that_follow_from_the_option_make_no_column(make_run):
    from sae_runner.report.comparison import compare
    from sae_runner.report.runs import load_runs

    def folder(name: str, model: str, width: int, lr: float):
        choices = {"model": model, "sae": "topk"}
        config = {"model.type": "tiny_clip", "model.width": width, "trainer.lr": lr}
        return make_run(name, config=config, report={"choices": choices})

    small = [folder("a", "small", 64, 0.1), folder("b", "small", 64, 0.2)]
    runs, _ = load_runs([*small, folder("c", "large", 128, 0.1)])
    telling = compare(runs, ["sparsity.l0"], "sparsity.l0", "reconstruction.fvu").telling
    by_run = {run.name: i for i, run in enumerate(runs)}
    assert list(telling) == ["model", "trainer.lr"]
    assert telling["model"][by_run["c"]] == "large"
    # Once a key varies within an option, it is a column of its own again.
    runs, _ = load_runs([*(run.path for run in runs), folder("d", "large", 256, 0.1)])
    telling = compare(runs, ["sparsity.l0"], "sparsity.l0", "reconstruction.fvu").telling
    assert list(telling) == ["model", "model.width", "trainer.lr"]


def test_what_the_metrics_measure_is_said(make_run: MakeRun) -> None:
    runs = load(make_run("a"), make_run("b"))
    for run in runs:
        for name, envelope in run.evaluators.items():
            envelope["axis"] = "faithfulness" if name == "reconstruction" else "interpretability"
    comparison = compare(runs, [X, "reconstruction.mse", Y, "other.thing"], X, Y)
    assert comparison.axes == (
        "faithfulness: reconstruction.mse, reconstruction.fvu; interpretability: sparsity.l0"
    )
