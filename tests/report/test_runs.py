import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_runner.errors import ConfigError, InputError
from sae_runner.report.runs import choose_metrics, find_runs, flat, load_runs

MakeRun = Callable[..., Path]


def test_without_words_every_run_with_a_report_is_meant(make_run: MakeRun, tmp_path: Path) -> None:
    a, b = make_run("a"), make_run("b")
    unfinished = make_run("c", with_report=False)
    (tmp_path / "train" / "notes").mkdir()
    assert find_runs([], tmp_path / "train") == ([a, b], [unfinished])


def test_a_run_can_be_named_in_many_ways_and_counts_once(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make_run("toy-topk-1"), make_run("toy-topk-2")
    c = make_run("toy-relu-1")
    train = tmp_path / "train"
    assert find_runs([str(a)], Path("nowhere"))[0] == [a]
    assert find_runs([str(a / "report.json")], Path("nowhere"))[0] == [a]
    assert find_runs([str(train / "toy-topk-*")], Path("nowhere"))[0] == [a, b]
    assert find_runs([str(train)], Path("nowhere"))[0] == [c, a, b]
    monkeypatch.chdir(tmp_path)
    words = ["train/toy-topk-1", str(a), "train/../train/toy-topk-1", "train/*-1/report.json"]
    assert [run.resolve() for run in find_runs(words, Path("nowhere"))[0]] == [a, c]


def test_a_typo_names_the_nearest_run(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("toy-topk-12345678")
    with pytest.raises(InputError) as error:
        find_runs([str(tmp_path / "train" / "toy-topk-1234567")], tmp_path)
    assert "no run directory there. Did you mean 'toy-topk-12345678'?" in str(error.value)


@pytest.mark.parametrize("words", [[], ["nothing/*"]])
def test_no_run_is_one_line(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        find_runs(words, tmp_path / "train")
    assert "\n" not in str(error.value)


def test_only_unfinished_runs_say_what_to_type(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", with_report=False)
    with pytest.raises(InputError, match=f"sae-run eval checkpoint={run}"):
        find_runs([], tmp_path / "train")


def test_a_damaged_report_is_one_line_and_the_others_load(make_run: MakeRun) -> None:
    good, bad = make_run("good"), make_run("bad")
    (bad / "report.json").write_text('{"schema":\n "sae')
    runs, damaged = load_runs([bad, good])
    assert [run.name for run in runs] == ["good"]
    assert len(damaged) == 1
    assert str(bad / "report.json") in damaged[0]
    assert "\n" not in damaged[0]


def test_published_numbers_that_say_nothing_are_damage_that_names_its_file(
    make_run: MakeRun,
) -> None:
    bad = make_run("bad", config={"expected": [{"metric": "sparsity.l0"}]})
    runs, damaged = load_runs([bad])
    assert runs == []
    assert damaged[0].startswith(f"{bad / 'report.json'}: config.expected[0].low needs a value")


def test_stored_verdicts_are_not_judged_again(make_run: MakeRun) -> None:
    expected = [{"metric": "sparsity.l0", "low": 0, "high": 99}]
    run = make_run("a", config={"expected": expected})
    report = json.loads((run / "report.json").read_text())
    (fresh,) = load_runs([run])[0][0].verdicts
    assert fresh["verdict"] == "reproduced"
    report["expected"] = [fresh | {"verdict": "not comparable", "why": "by hand"}]
    (run / "report.json").write_text(json.dumps(report))
    assert load_runs([run])[0][0].verdicts == report["expected"]


def test_runs_of_one_name_in_two_places_are_told_apart(make_run: MakeRun) -> None:
    a, b = make_run("../one/run"), make_run("../two/run")
    runs, _ = load_runs([a, b, make_run("other")])
    assert [run.name for run in runs] == [str(a), str(b), "other"]


def test_flat_keeps_lists_and_empty_mappings() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": []}, "e": {}}) == {"a.b.c": 1, "a.d": [], "e": {}}


def test_metrics_are_chosen_by_name_and_glob_in_order(make_run: MakeRun) -> None:
    runs, _ = load_runs([make_run()])
    wanted = ["density.dead_frac", "sparsity.l0*", "sparsity.l0"]
    assert choose_metrics(wanted, runs, "metrics") == [
        "density.dead_frac", "sparsity.l0", "sparsity.l0_p05",
    ]  # fmt: skip


def test_a_metric_of_an_evaluator_that_was_not_run_is_left_out(make_run: MakeRun) -> None:
    runs, _ = load_runs([make_run()])
    wanted = ["recovery.mmcs_true_to_sae", "sparsity.l0"]
    assert choose_metrics(wanted, runs, "metrics") == ["sparsity.l0"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("reconstruction.fvuu", "reconstruction.fvu"), ("sparcity.l0", "sparsity.l0")],
)
def test_an_unknown_metric_names_the_nearest(make_run: MakeRun, name: str, nearest: str) -> None:
    runs, _ = load_runs([make_run()])
    with pytest.raises(ConfigError) as error:
        choose_metrics([name], runs, "metrics")
    assert str(error.value).startswith(
        f"metrics={name}: no run measured it. Did you mean {nearest!r}?"
    )
    assert "\n" not in str(error.value)


def test_a_glob_that_matches_nothing_is_refused(make_run: MakeRun) -> None:
    runs, _ = load_runs([make_run()])
    with pytest.raises(ConfigError, match="no run measured it"):
        choose_metrics(["sparsity.x*"], runs, "metrics")


def test_a_run_is_found_by_its_name_too(make_run, tmp_path, monkeypatch):
    from sae_runner.report.runs import find_runs

    first, second = make_run("toy-topk-1"), make_run("toy-relu-2")
    train_dir = first.parent
    monkeypatch.chdir(tmp_path)
    assert find_runs(["toy-topk-1"], train_dir)[0] == [first]
    assert set(find_runs(["toy-*"], train_dir)[0]) == {first, second}
