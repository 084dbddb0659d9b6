"""What a shell is offered for the last word of a line."""

import pytest

from sae_runner.cli import COMMANDS, TAKES_PATHS, ask_hydra
from sae_runner.completion import candidates


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """`offered("sae-run train sae=")` in a folder with two runs, a store and a report."""
    monkeypatch.chdir(tmp_path)
    for name in ("train/toy-a", "train/toy-b", "train/.hidden", "stores/toy-s", "reports/1f"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
    (tmp_path / "elsewhere" / "train" / "far").mkdir(parents=True)
    (tmp_path / "data.tsv").touch()
    monkeypatch.setattr("sys.argv", ["sae-run", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", "")  # `ask_hydra` sets it.
    return lambda line: candidates(line, COMMANDS, TAKES_PATHS, ask_hydra)


def test_commands(offered):
    assert offered("sae-run ") == list(COMMANDS) == offered("sae-run tr")


def test_flags(offered):
    assert offered("sae-run train --mul") == ["--multirun"]
    assert "--cfg" in offered("sae-run train sae=topk --c")
    assert offered("sae-run train --cfg ") == []


@pytest.mark.parametrize("key", ["eval checkpoint", "export checkpoint", "train init_from"])
def test_runs_where_a_run_is_meant(offered, key):
    command, name = key.split()
    runs = ["outputs/train/toy-a", "outputs/train/toy-b"]
    assert offered(f"sae-run {key}=") == [f"{name}={run}" for run in runs]
    assert offered(f"sae-run {key}=outputs/train/toy-b") == [f"{name}={runs[1]}"]
    assert offered(f"sae-run {key}=toy-a") == [f"{name}=toy-a"]
    assert offered(f"sae-run {key}=else") == [f"{name}=elsewhere/"]
    line = f"sae-run {command} outputs=elsewhere {name}="
    assert offered(line) == [f"{name}=elsewhere/train/far"]


def test_words_of_report_ls_and_rm_are_things_below_outputs_and_no_groups(offered):
    runs = ["outputs/train/toy-a", "outputs/train/toy-b"]
    keys = [
        "attribution=", "compare=", "firing=", "metrics=", "out=", "outputs=", "proxy=", "runs=",
        "similarity=", "x=", "y=",
    ]  # fmt: skip
    assert offered("sae-run report ") == keys + runs
    assert offered("sae-run report outputs/train/toy-a outputs/") == runs
    things = ["outputs/reports/1f", "outputs/stores/toy-s", *runs]
    assert offered("sae-run ls ") == ["outputs=", "runs=", *things]
    assert offered("sae-run rm toy-") == ["toy-s", "toy-a", "toy-b"]
    assert offered("sae-run rm y") == ["yes="]
    assert offered("sae-run ls mod") == []


def test_paths_where_a_path_is_meant(offered):
    assert offered("sae-run train dataset.path=da") == ["dataset.path=data.tsv"]
    assert offered("sae-run train outputs=el") == ["outputs=elsewhere/"]
    assert offered("sae-run train --config-dir el") == ["elsewhere/"]


def test_each_value_of_a_sweep(offered):
    assert offered("sae-run train sae=topk,ga") == ["sae=topk,gated"]
    assert offered("sae-run train -m model=toy sae=gated,relu,ga") == []
    assert "sae=topk" in offered("sae-run train -m sae=t")


def test_keys_of_the_options_that_were_chosen(offered):
    assert offered("sae-run train sae=relu sae.l1") == ["sae.l1_coefficient="]
