import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_runner.errors import StoreError
from sae_runner.report.schema import check_report, flat_ci, flat_metrics, load_report

MakeRun = Callable[..., Path]


def read(make_run: MakeRun) -> dict[str, Any]:
    report: dict[str, Any] = load_report(make_run())
    return report


def test_a_report_is_found_by_folder_and_by_file(make_run: MakeRun) -> None:
    run = make_run()
    assert load_report(run) == load_report(run / "report.json")


DAMAGE: list[tuple[str, Callable[[Any], Any], str]] = [
    ("key", lambda r: r.pop("seed"), "key 'seed' is missing"),
    ("kind", lambda r: r.update(seed="0"), "'seed' is a str"),
    ("schema", lambda r: r.update(schema="sae-run.report/9"), "schema 'sae-run.report/9'"),
    ("nan", lambda r: r["training"].update(loss=float("nan")), "training.loss is not a finite"),
    ("evaluator", lambda r: r["evaluators"].update(x=3), "evaluators.x: is a int, not a mapping"),
    (
        "verdict",
        lambda r: r["expected"].append({"metric": "x"}),
        "expected[0]: key 'value' is missing",
    ),
    (
        "note",
        lambda r: r["evaluators"]["density"]["notes"].append({"code": "x"}),
        "notes[0]: key 'metric' is missing",
    ),
    (
        "interval",
        lambda r: r["evaluators"]["density"]["ci"].update(a={"lo": 1, "hi": 2, "n": 3}),
        "ci.a: key 'se' is missing",
    ),
    (
        "category",
        lambda r: r["evaluators"]["density"]["metrics"].update(density=0.5),
        "metrics.density: is a float, not a mapping",
    ),
    (
        "metric",
        lambda r: r["evaluators"]["density"]["metrics"]["density"].update(dead_frac="0.2"),
        "metrics.density: 'dead_frac' is a str",
    ),
    (
        "null",
        lambda r: r["evaluators"]["density"]["metrics"]["density"].update(dead_frac=None),
        "density.dead_frac is null without a note",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_named(make_run: MakeRun, damage: Callable[[Any], Any], message: str) -> None:
    report = read(make_run)
    check_report(copy.deepcopy(report))
    damage(report)
    with pytest.raises(StoreError) as error:
        check_report(report)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", '{"schema": ', "[]", "7", "null", b"\xff\xfe\x00"])
def test_a_file_that_is_no_report_is_said_in_one_line(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StoreError) as error:
        load_report(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_report_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="sae-run eval checkpoint="):
        load_report(tmp_path)


def test_metrics_are_named_by_category_and_name(make_run: MakeRun) -> None:
    evaluators = read(make_run)["evaluators"]
    metrics = flat_metrics(evaluators)
    assert metrics["sparsity.l0"] == 31.4
    assert metrics["density.dead_frac"] == 0.25
    assert flat_ci(evaluators)["reconstruction.fvu"]["lo"] == 0.1194
    assert len(metrics) == sum(len(c) for e in evaluators.values() for c in e["metrics"].values())


def test_two_evaluators_of_one_type_keep_their_numbers_apart(make_run: MakeRun) -> None:
    evaluators = read(make_run)["evaluators"]
    other = copy.deepcopy(evaluators["sparsity"])
    other["evaluator"] = "above_tenth"
    other["metrics"]["sparsity"]["l0"] = 3.0
    other["ci"]["sparsity.l0"] = {"se": 0.1, "lo": 2.9, "hi": 3.1, "n": 5}
    both = {"above_tenth": other} | evaluators
    metrics, ci = flat_metrics(both), flat_ci(both)
    assert metrics["sparsity.l0"] == 31.4
    assert metrics["above_tenth/sparsity.l0"] == 3.0
    assert ci["sparsity.l0"]["lo"] == 31.3
    assert ci["above_tenth/sparsity.l0"]["lo"] == 2.9
    assert json.dumps(flat_metrics(evaluators)) == json.dumps(
        {k: v for k, v in metrics.items() if "/" not in k}
    )
