import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_runner.commands.job import Job
from sae_runner.commands.report import main
from sae_runner.config import config_dir
from sae_runner.errors import InputError

MakeRun = Callable[..., Path]
write_run = runpy.run_path(str(Path(__file__).parents[1] / "report" / "conftest.py"))["write_run"]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Without anything to draw unless it is asked for, since drawing takes the longest."""

    def make(name: str, **changes: Any) -> Path:
        defaults: dict[str, Any] = {"n_steps": 0, "with_series": False}
        write_run(tmp_path / "train" / name, **(defaults | changes))
        return tmp_path / "train" / name

    return make


def job(tmp_path: Path, *words: str, **changes: Any) -> Job:
    """The command as it is composed from configs/report.yaml."""
    cfg = yaml.safe_load((Path(config_dir()) / "report.yaml").read_text())
    del cfg["hydra"], cfg["defaults"]
    return Job({**cfg, "outputs": str(tmp_path), "runs": list(words), **changes}, {}, [])


def test_the_table_is_printed_and_the_files_are_written(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in (16, 32):
        changes = {"config": {"sae.k": k}, "metrics": {"sparsity.l0": float(k)}, "ci": {}}
        make_run(f"toy-topk-{k}", n_steps=9, with_series=True, **changes)
    main(job(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "#", "run", "k", "l0", "fvu", "explained_variance", "cosine", "mse", "dead_frac",
    ]  # fmt: skip
    assert lines[1].split()[:4] == ["1", "toy-topk-16", "16", "16"]
    page = Path(lines[-1])
    assert page.name == "report.html" and page.parent.parent == tmp_path / "reports"
    assert {p.relative_to(page.parent).as_posix() for p in page.parent.rglob("*.*")} == {
        "report.html", "report.md", "table.csv", "figures/pareto.png", "figures/pareto.svg",
    }  # fmt: skip
    assert page.read_text().count("data:image/svg+xml;base64,") == 1 + 2 * 4
    assert (tmp_path / "train" / "toy-topk-16" / "figures" / "loss.png").is_file()


def test_the_same_runs_give_the_same_files_again(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("a"), make_run("b")
    main(job(tmp_path))
    (folder,) = (tmp_path / "reports").iterdir()
    first = {path: path.read_bytes() for path in folder.rglob("*.*")}
    main(job(tmp_path, str(tmp_path / "train" / "*")))
    assert list((tmp_path / "reports").iterdir()) == [folder]
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == first


def test_words_out_metrics_and_axes_are_obeyed(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_run("a")
    make_run("b")
    out = tmp_path / "elsewhere"
    main(job(tmp_path, str(a), out=str(out), metrics=["sparsity.*"], y="reconstruction.mse"))
    text = capsys.readouterr().out
    assert text.split("\n", 1)[0].split() == ["#", "run", "l0", "l0_p05", "l1"]
    assert "b" not in [line.split()[1] for line in text.splitlines()[1:2]]
    assert "reconstruction.mse (lower is better)" in (out / "figures" / "pareto.svg").read_text()


def test_figures_are_drawn_again_only_if_the_run_has_changed(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("a", n_steps=9)
    main(job(tmp_path))
    figure = run / "figures" / "loss.svg"
    first = figure.stat().st_mtime_ns
    main(job(tmp_path))
    assert figure.stat().st_mtime_ns == first
    later = first / 1e9 + 10
    os.utime(run / "metrics.jsonl", (later, later))
    main(job(tmp_path))
    assert figure.stat().st_mtime_ns != first


def test_a_damaged_report_is_named_the_others_shown_and_the_exit_code_is_1(
    make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_run("good")
    bad = make_run("bad") / "report.json"
    bad.write_text(bad.read_text()[:1000])
    make_run("unfinished", with_report=False)
    with pytest.raises(SystemExit) as stop:
        main(job(tmp_path))
    assert stop.value.code == 1
    damaged, without = [record.getMessage() for record in caplog.records]
    assert str(bad) in damaged and "\n" not in damaged
    assert without == "left out, 1 without a report.json: unfinished"
    out = capsys.readouterr().out
    assert "good" in out
    assert "left out, 1 without a report.json: unfinished" in Path(out.split()[-1]).read_text()


def test_only_damaged_reports_are_one_line_and_nothing_is_written(
    make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("bad", "worse"):
        (make_run(name) / "report.json").write_text("{}")
    with pytest.raises(InputError, match=r"all 2 reports are damaged, the first: .*bad/report"):
        main(job(tmp_path))
    assert not caplog.records
    assert not (tmp_path / "reports").exists()


def test_a_series_of_another_shape_costs_the_figures_not_the_report(
    make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run("a")
    (run / "eval" / "step_00000060" / "sparsity.json").write_text(
        '{"series": {"l0_histogram": {"counts": 3}}}'
    )
    main(job(tmp_path))
    assert f"no figures of {run}" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["reconstruction.fvuu"]}, "metrics=reconstruction.fvuu: no run measured it."),
        ({"x": "sparsity.l_0"}, "x=sparsity.l_0: no run measured it. Did you mean 'sparsity.l0'?"),
        ({"y": "fvu"}, "y=fvu: no run measured it."),
        ({"out": "/proc/x"}, "out=/proc/x: cannot write in /proc"),
        ({"out": ["a", "b"]}, "out="),
        ({"metrix": []}, "no key 'metrix'. Did you mean 'metrics'?"),
    ],
)
def test_bad_options_are_one_line(
    make_run: MakeRun, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    make_run("a")
    with pytest.raises(InputError) as error:
        main(job(tmp_path, **changes))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "reports").exists()


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run with a report\.json in"):
        main(job(tmp_path))


def test_an_axis_that_was_not_measured_leaves_out_the_figure_only(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run("a")
    main(job(tmp_path, y="recovery.mmcs_true_to_sae", out=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "figures").exists()
    assert "pareto" not in (tmp_path / "out" / "report.md").read_text()


def test_a_terminal_gets_a_table_that_fits(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make_run("a", config={"dataset.path": "/a/very/long/path/of/a/dataset/that/takes/room"})
    make_run("b")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    main(job(tmp_path))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert "…dataset/that/takes/room" in lines[2]
    assert "no room here for density.dead_frac: see the page, or table.csv" in lines
    assert max(map(len, lines[:5])) <= 100


def test_rank_correlations_of_metrics_are_in_every_file_and_need_no_torch(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for i in range(12):
        values = {"sparsity.l0": float(i), "reconstruction.fvu": 1 / (i + 1), "sparsity.l1": 2.0}
        make_run(f"run-{i:02}", metrics=values, ci={})
    changes = {"compare": ["proxy"], "metrics": ["sparsity.*", "reconstruction.fvu"]}
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sae_runner.commands.job import Job\n"
        "from sae_runner.commands.report import main\n"
        f"main(Job({job(tmp_path, **changes).cfg!r}, {{}}, []))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = Path(done.stdout.split()[-1]).parent
    proxy = json.loads((out / "comparisons.json").read_text())["proxy"]
    found = {(record["x"], record["y"]): record for record in proxy["found"]}
    assert found["sparsity.l0", "reconstruction.fvu"]["rho"] == -1
    assert found["sparsity.l0", "sparsity.l1"]["note"] == "constant: sparsity.l1"
    row = "all runs,sparsity.l0,reconstruction.fvu,-1.0,-1.0,-1.0,12,"
    assert row in (out / "proxy.csv").read_text().splitlines()
    assert "![Which metric goes with which](figures/proxy.png)" in (out / "report.md").read_text()
    assert (out / "figures" / "proxy.png").is_file()
    page = (out / "report.html").read_text()
    assert (
        page.count("data:image/svg+xml;base64,") == 2
        and "constant: sparsity.l0_p05, sparsity.l1" in page
    )


def test_no_table_is_printed_where_nothing_could_be_correlated(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(10):
        make_run(f"run-{i}", metrics={"sparsity.l0": 8.0, "reconstruction.fvu": 0.5}, ci={})
    main(job(tmp_path, compare=["proxy"], metrics=["sparsity.l0", "reconstruction.fvu"]))
    out = capsys.readouterr().out
    after = out[out.index("Which metric goes with which") :].splitlines()
    assert after[1].startswith("! without a correlation") and "over" not in after[1]


def test_metrics_of_runs_that_are_not_comparable_are_correlated_with_a_warning(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(10):
        make_run(f"run-{i}", metrics={"sparsity.l0": float(i)}, ci={},
                 fingerprints={"dataset": "c" * 64} if i > 6 else {})  # fmt: skip
    main(job(tmp_path, compare="proxy"))
    assert "! the runs are of groups A, B, which are not comparable" in capsys.readouterr().out


def test_no_torch_is_needed(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("a", config={"expected": [{"metric": "sparsity.l0", "low": 30, "high": 33}]})
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sae_runner.commands.job import Job\n"
        "from sae_runner.commands.report import main\n"
        f"main(Job({job(tmp_path).cfg!r}, {{}}, []))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reproduced" in done.stdout
