import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sae_runner.report.comparison import Comparison, compare
from sae_runner.report.runs import load_runs
from sae_runner.report.table import (
    columns_of,
    csv_text,
    escaped,
    expected_rows,
    fitting,
    markdown,
    markdown_table,
    plain_text,
    rich_table,
    short_names,
    show_metric,
    show_number,
)

MakeRun = Callable[..., Path]
X, Y = "sparsity.l0", "reconstruction.fvu"
METRICS = [X, Y, "reconstruction.cosine", "density.dead_frac"]


@pytest.fixture
def comparison(make_run: MakeRun) -> Comparison:
    null = {"code": "zero_denominator", "metric": "reconstruction.cosine", "detail": "no rows"}
    expected = [{"metric": Y, "value": 0.13, "low": 0.1, "high": 0.15, "source": "Study [1]"}]
    folders = [
        make_run("a", config={"sae.k": 16}, metrics={X: 16}, ci={}),
        make_run("b", config={"expected": expected}),
        make_run("c", metrics={X: 64, "reconstruction.cosine": None}, notes=[null],
                 config={"sae.type": "relu", "sae.l1_coefficient": 0.1}),
        make_run("d", metrics={X: 70, "reconstruction.cosine": 0.9}, ci={},
                 config={"sae.type": "relu", "sae.l1_coefficient": 0.2}),
    ]  # fmt: skip
    return compare(load_runs(folders)[0], METRICS, X, Y)


@pytest.mark.parametrize(
    ("value", "lo", "hi", "shown"),
    [
        (0.861234, 0.858, 0.864, "0.8612 ±0.0030"),
        (31.4159, 31.3, 31.5, "31.42 ±0.10"),
        (6458.2, 6300.0, 6620.0, "6,458 ±160"),
        (0.861, 0.80, 0.87, "0.861 [0.800, 0.870]"),  # lopsided
        (0.861, 0.87, 0.89, "0.861 [0.870, 0.890]"),  # does not hold the value
        (32.0, 32.0, 32.0, "32 ±0"),
        (3.1e-9, 3.0e-9, 3.2e-9, "3.1e-09 ±1e-10"),
    ],
)
def test_a_value_has_the_digits_its_interval_leaves_it(
    value: float, lo: float, hi: float, shown: str
) -> None:
    assert show_metric(value, {"se": 0.0, "lo": lo, "hi": hi, "n": 9}) == shown


def test_numbers_without_an_interval() -> None:
    shown = {
        0.123456: "0.1235", 32.0: "32", 65536: "65,536", 0: "0", 1e-7: "1e-07",
        123456.7: "123,457", -7.55: "-7.55",
    }  # fmt: skip
    assert {value: show_number(value) for value in shown} == shown
    assert show_metric(None) == "null"


def test_one_row_per_run_with_differing_keys_then_metrics(comparison: Comparison) -> None:
    columns = columns_of(comparison)
    assert [column.name for column in columns] == [
        "#", "run", "sae", "sae.k", "sae.l1_coefficient", *METRICS,
    ]  # fmt: skip
    cells = {column.name: column.cells for column in columns}
    assert cells["run"] == ["c", "d", "a", "b"]
    assert cells["sae.k"] == ["32", "32", "16", "32"]
    assert cells["sae.l1_coefficient"] == ["0.1", "0.2", "—", "—"]
    assert cells[X] == ["64.00 [31.30, 31.50]", "70", "16", "31.40 ±0.10"]
    assert cells["reconstruction.cosine"] == ["null", "0.9", "0.951", "0.951"]


def test_what_was_not_measured_is_no_null(make_run: MakeRun) -> None:
    runs, _ = load_runs([make_run("a"), make_run("b")])
    del runs[0].metrics[Y]
    (column,) = [c for c in columns_of(compare(runs, [Y], X, Y)) if c.name == Y]
    assert column.cells == ["—", "0.1234 ±0.0040"]


def test_groups_have_a_column_only_if_there_are_several(make_run: MakeRun) -> None:
    runs, _ = load_runs([make_run("a"), make_run("b", fingerprints={"model": "f"})])
    columns = columns_of(compare(runs, [X], X, Y))
    assert [c.cells for c in columns if c.name == "group"] == [["A", "B"]]


def test_short_names_stay_unambiguous() -> None:
    assert short_names(["sae.k", "model.type", "sae.type"]) == {
        "sae.k": "k", "model.type": "model.type", "sae.type": "sae.type",
    }  # fmt: skip


def test_plain_text_is_aligned_and_whole(comparison: Comparison) -> None:
    lines = plain_text(columns_of(comparison)).splitlines()
    assert len(lines) == 5
    assert lines[0].split() == [
        "#", "run", "sae", "k", "l1_coefficient", "l0", "fvu", "cosine", "dead_frac",
    ]  # fmt: skip
    end = lines[0].index("l0") + 2
    assert [line[end - 4 : end] for line in lines[1:]] == [".50]", "  70", "  16", "0.10"]
    assert all("\x1b" not in line for line in lines)


@pytest.mark.parametrize(
    ("width", "left"),
    [
        (10_000, ["sae", "sae.k", "sae.l1_coefficient", *METRICS]),
        (80, ["sae", "sae.k", "sae.l1_coefficient", *METRICS[:3]]),
        (60, ["sae", "sae.k", *METRICS[:2]]),
        (9, METRICS[:2]),
    ],
)
def test_a_narrow_terminal_leaves_out_columns_and_names_them(
    comparison: Comparison, width: int, left: list[str]
) -> None:
    columns = columns_of(comparison)
    kept, dropped = fitting(columns, width)
    assert [column.name for column in kept] == ["#", "run", *left]
    assert dropped == [c.name for c in columns if c.name not in {k.name for k in kept}]
    if width > 9:
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(rich_table(kept))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        assert sum("[31.30, 31.50]" in line for line in lines) == 1  # Nothing is wrapped.


def test_csv_has_every_digit_and_tells_null_from_nothing(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert [row["run"] for row in rows] == ["c", "d", "a", "b"]
    by_name = {row["run"]: row for row in rows}
    assert by_name["c"]["reconstruction.cosine"] == "null"
    assert by_name["a"]["sparsity.l0.lo"] == ""
    assert by_name["a"]["sae.l1_coefficient"] == ""
    assert [float(by_name["b"][f"{Y}{part}"]) for part in ("", ".se", ".lo", ".hi", ".n")] == [
        0.1234, 0.002, 0.1194, 0.1274, 512,
    ]  # fmt: skip
    assert "reconstruction.cosine.lo" not in rows[0]


def test_csv_quotes_what_it_must(make_run: MakeRun) -> None:
    folders = [make_run("a", config={"dataset.path": 'x,"y"\nz'}), make_run("b")]
    comparison = compare(load_runs(folders)[0], [X], X, Y)
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert rows[0]["dataset.path"] == 'x,"y"\nz'


def test_markdown_cells_hold_no_markup() -> None:
    assert escaped("a|b_c\n<i>*`[x]") == r"a\|b\_c \<i>\*\`\[x]"
    table = markdown_table(["h|h"], [["<script>"]])
    assert table == "| h\\|h |\n| --- |\n| \\<script> |"


def test_markdown_report_has_its_parts(comparison: Comparison) -> None:
    text = markdown(comparison, ["left out, damaged: x/report.json is no JSON"], "figures/p.png")
    assert "| # | run | sae | sae.k | sae.l1\\_coefficient | sparsity.l0 |" in text
    assert "- left out, damaged: x/report.json is no JSON" in text
    assert "![reconstruction.fvu against sparsity.l0](figures/p.png)" in text
    assert "| 4 | reconstruction.fvu | reproduced | 0.1234 ±0.0040 | 0.13 | \\[0.1, 0.15] |" in text
    assert "| trainer.lr | 0.0004 |" in text
    assert "\n| sae.k |" not in text  # It differs, so it is not among the same.


def test_expected_rows_name_their_run(comparison: Comparison) -> None:
    assert [row[:3] for row in expected_rows(comparison)] == [["4", Y, "reproduced"]]
