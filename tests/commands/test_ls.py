import os
import subprocess
import sys

import pytest

from sae_runner import files
from sae_runner.commands.ls import main


@pytest.fixture
def ls(compose_job, capsys):
    """`ls(outputs, "WORD")`: what is printed, as lines."""

    def ls(outputs, *words):
        job = compose_job("ls", f"outputs={outputs}")
        main(job._replace(cfg={**job.cfg, "runs": list(words)}))
        return capsys.readouterr().out.splitlines()

    return ls


def test_a_store_and_a_run_with_what_they_need(trained, ls):
    (run,), (store,) = trained.glob("train/[!.]*"), trained.glob("stores/[!.]*")
    lines = ls(trained)
    by_path = {line.split()[0]: line.split() for line in lines if line}
    assert by_path[str(store)][-1] == run.name  # used by
    assert by_path[str(store / "activations-all")][-1] == run.name
    assert by_path[str(run)][-1] == f"{store.name}/activations-all"  # needs
    assert [line.split()[0] for line in lines if line.startswith(("stores", "runs", "models"))] == [
        "stores", "runs",
    ]  # fmt: skip
    total = files.folder_bytes(store) + files.folder_bytes(run)
    assert lines[-1].startswith(f"{files.size(total)} in all; ") and lines[-1].endswith(" free")
    assert files.size(files.folder_bytes(run)) in " ".join(by_path[str(run)])


def test_words_restrict(trained, ls):
    (run,), (store,) = trained.glob("train/[!.]*"), trained.glob("stores/[!.]*")
    lines = ls(trained, run.name)
    assert str(run) in lines[1] and not any(str(store) in line for line in lines)
    # A selection alone is counted once, its store not at all.
    lines = ls(trained, f"{store.name}/activations-all")
    size = files.size(files.folder_bytes(store / "activations-all"))
    assert len([line for line in lines if line.startswith("/")]) == 1
    assert lines[-1].startswith(f"{size} in all")


def test_age_is_that_of_the_newest_file(write, tmp_path, ls):
    old, new = write("train/a/config.yaml", {}), write("train/a/run.log", "")
    now = old.stat().st_mtime
    for path, age in ((old, 90_000), (new, 7300), (old.parent, 90_000)):
        os.utime(path, (now - age, now - age))
    assert "  2h" in ls(tmp_path / "outputs")[1]


def test_what_another_process_has_is_said_to_be_in_use(outputs, ls):
    (run,) = outputs.glob("train/[!.]*")
    with files.locked(run):
        assert "in use, complete" in ls(outputs, run.name)[1]
    assert "in use" not in ls(outputs, run.name)[1]


def test_a_stopped_training_says_how_far_it_got(tmp_path, ls):
    kept = tmp_path / "outputs" / "models" / "tiny_clip-digits-0" / "training"
    kept.mkdir(parents=True)
    (kept / "state.json").write_text('{"losses": [1.5, 1.25], "n_steps": 220}')
    assert "unfinished: step 2 of 220" in ls(tmp_path / "outputs")[1]
    (kept / "state.json").write_text("{")
    assert "unfinished: no weights" in ls(tmp_path / "outputs")[1]


def test_reports_exports_and_records_of_sweeps(write, tmp_path, ls):
    write("reports/1f/table.csv", "run,path\na,b\nc,d\n")
    write("reports/1f/report.html")
    write("reports/2e/table.csv", "run,path\na,b\n")
    write("exports/toy-a-saelens/README.md")
    write("sweeps/multirun.yaml", "hydra: 1")
    lines = [line.split() for line in ls(tmp_path / "outputs") if line]
    heads = ["reports", "exports", "sweeps"]
    assert [line[0] for line in lines if line[0] in heads] == heads
    shown = {line[0].rpartition("/")[2]: " ".join(line[1:]) for line in lines}
    assert shown["1f"].startswith("complete 2 runs ")
    assert shown["2e"].startswith("unfinished: no report.html 1 run ")
    assert shown["toy-a-saelens"].startswith("complete saelens ")
    assert "complete records of launchers" in " ".join(lines[-2])


def test_before_anything_was_made_there_is_nothing(in_process, capsys, tmp_path):
    assert in_process("ls") == 0
    assert capsys.readouterr().out == "nothing in outputs yet\n"
    assert list(tmp_path.iterdir()) == []


def test_nothing_yet(tmp_path, ls):
    (tmp_path / "outputs").mkdir()
    assert ls(tmp_path / "outputs") == [f"nothing in {tmp_path / 'outputs'} yet"]


@pytest.mark.parametrize("words", [["ls"], ["rm", "nothing-here"], ["ls", "--help"]])
def test_ls_and_rm_never_import_torch(trained, words):
    code = (
        "import sys; from sae_runner.cli import main\n"
        f"sys.argv = ['sae-run', *{words!r}, 'outputs={trained}']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout or "nothing-here" in done.stderr
