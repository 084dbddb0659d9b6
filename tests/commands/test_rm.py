import io
import shutil
import sys

import pytest

from sae_runner import files
from sae_runner.commands import rm as rm_module
from sae_runner.commands.rm import main
from sae_runner.errors import ConfigError, InputError, Interrupted


@pytest.fixture
def rm(compose_job):
    """`rm(outputs, "WORD", yes=True)`."""

    def rm(outputs, *words, **changes):
        job = compose_job("rm", f"outputs={outputs}")
        main(job._replace(cfg={**job.cfg, "runs": list(words), **changes}))

    return rm


@pytest.fixture
def places(outputs):
    (run,), (store,) = outputs.glob("train/[!.]*"), outputs.glob("stores/[!.]*")
    return run, store


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_run_goes_alone_and_frees_what_it_took(outputs, places, rm, snapshot, capsys):
    run, store = places
    size, before = files.folder_bytes(run), snapshot(store)
    rm(outputs, str(run), yes=True)
    assert f"{files.size(size)} freed" in capsys.readouterr().out
    assert not run.exists() and snapshot(store) == before
    assert list((outputs / "train").iterdir()) == []  # Its lock is gone too.


@pytest.mark.parametrize("what", ["store", "selection"])
def test_a_store_that_a_run_needs_stays(outputs, places, rm, snapshot, what):
    run, store = places
    before = snapshot(outputs)
    word = store.name if what == "store" else f"{store.name}/activations-all"
    with pytest.raises(InputError, match=f"is needed by .*{run.name}: remove these in the same"):
        rm(outputs, word, yes=True)
    assert snapshot(outputs) == before


def test_a_store_goes_with_the_runs_that_need_it(outputs, places, rm):
    run, store = places
    rm(outputs, store.name, run.name, yes=True)
    assert not run.exists() and not store.exists()


def test_a_store_goes_once_its_runs_are_gone(outputs, places, rm):
    run, store = places
    rm(outputs, run.name, yes=True)
    rm(outputs, f"{store.name}/activations-all", yes=True)
    assert not (store / "activations-all").exists() and (store / "store.json").is_file()
    assert files.lock_path(store).exists()  # The lock of the store, which stays.
    rm(outputs, store.name, yes=True)
    assert list((outputs / "stores").iterdir()) == []


def test_a_model_that_a_store_names_stays(write, tmp_path, rm):
    weights = write("models/tiny-1/weights.safetensors", "x")
    write("models/tiny-1/facts.json", {"sha256": "c" * 64})
    store = write("stores/s/store.json", {"model": {"sha256": "c" * 64}, "dataset": {}})
    with pytest.raises(InputError, match=r"model .*tiny-1 is needed by .*stores/s: "):
        rm(tmp_path / "outputs", "tiny-1", yes=True)
    assert weights.exists()
    rm(tmp_path / "outputs", "tiny-1", "s", yes=True)
    assert not weights.exists() and not store.exists()


@pytest.mark.parametrize(
    ("reply", "gone"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_someone_at_a_terminal_is_asked(outputs, places, rm, monkeypatch, capsys, reply, gone):
    run, _ = places
    monkeypatch.setattr(sys, "stdin", Terminal(reply))
    rm(outputs, run.name)
    out = capsys.readouterr().out
    assert str(run) in out and "[y/N]" in out
    assert run.exists() is not gone
    assert ("nothing was removed" in out) is not gone


def test_no_answer_ends_the_line(outputs, places, rm, monkeypatch, capsys):
    run, _ = places
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    rm(outputs, run.name)
    assert capsys.readouterr().out.endswith("[y/N] \nnothing was removed\n")

    def interrupted(_):
        raise Interrupted(2)

    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(Interrupted):
        rm(outputs, run.name)
    assert capsys.readouterr().out.endswith("\n\n") and run.exists()


def test_reports_exports_and_records_of_sweeps_go(write, tmp_path, rm):
    report, export = write("reports/1f/table.csv", "run\n"), write("exports/a-saelens/README.md")
    sweeps = write("sweeps/multirun.yaml")
    with pytest.raises(InputError, match=r"^reports is no store, run"):
        rm(tmp_path / "outputs", "reports", yes=True)
    rm(tmp_path / "outputs", "1f", "a-saelens", "sweeps", yes=True)
    assert not any(path.parent.exists() for path in (report, export, sweeps))
    assert (tmp_path / "outputs" / "reports").is_dir()


def test_without_a_terminal_nothing_goes_unless_yes(outputs, places, rm, monkeypatch, snapshot):
    run, _ = places
    before = snapshot(outputs)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(InputError, match="add yes=true"):
        rm(outputs, run.name)
    assert snapshot(outputs) == before


def test_what_a_process_is_writing_stays(outputs, places, rm):
    run, store = places
    with files.locked(run), pytest.raises(InputError, match=f"{run.name} is in use by another"):
        rm(outputs, run.name, yes=True)
    with files.locked(store), pytest.raises(InputError, match=f"{store.name} is in use by another"):
        rm(outputs, run.name, store.name, yes=True)
    assert run.exists() and store.exists()


def test_what_came_to_need_it_while_the_user_thought_is_seen(outputs, places, rm, monkeypatch):
    run, store = places
    rm(outputs, run.name, yes=True)
    other = outputs.parent / "other"
    shutil.copytree(outputs, other)

    def agree():
        path = outputs / "train" / "new" / "checkpoints" / "step_1" / "cfg.json"
        path.parent.mkdir(parents=True)
        (outputs / "train" / "new" / "config.yaml").write_text("{}")
        path.write_text(f'{{"step": 1, "store": "{store}/activations-all"}}')
        return True

    monkeypatch.setattr(rm_module, "agreed", agree)
    with pytest.raises(InputError, match=r"is needed by .*new"):
        rm(outputs, store.name)
    assert store.exists()


def test_killed_in_between_nothing_half_is_taken_for_whole(outputs, places, rm, monkeypatch):
    run, _ = places

    def killed(path):
        (path / "report.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        rm(outputs, run.name, yes=True)
    monkeypatch.undo()
    assert not run.exists()
    (left,) = (p for p in (outputs / "train").iterdir() if p.is_dir())
    rm(outputs, left.name, yes=True)
    assert not left.exists()


def test_a_link_goes_and_what_it_leads_to_stays(write, tmp_path, rm):
    outside = tmp_path / "mine"
    outside.mkdir()
    (outside / "config.yaml").write_text("{}")
    link = write("train/x/config.yaml").parent.parent / "linked"
    link.symlink_to(outside)
    rm(tmp_path / "outputs", "linked", yes=True)
    assert not link.is_symlink() and (outside / "config.yaml").exists()


def test_bad_calls_are_one_line(outputs, rm):
    with pytest.raises(InputError, match="name what to remove"):
        rm(outputs, yes=True)
    with pytest.raises(ConfigError, match=r"^yes=perhaps: "):
        rm(outputs, "x", yes="perhaps")


def test_on_the_command_line(in_process, tmp_path, trained, capsys):
    shutil.copytree(trained, tmp_path / "outputs")
    (run,) = (tmp_path / "outputs").glob("train/[!.]*")
    assert in_process("rm", str(run.relative_to(tmp_path)), "yes=true") == 0
    assert not run.exists() and "freed" in capsys.readouterr().out
    assert in_process("rm", run.name, "yes=true") == 2
    assert "nothing of that name" in capsys.readouterr().err
