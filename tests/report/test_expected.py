import pytest

from sae_runner.errors import ConfigError
from sae_runner.report.expected import check_expected, interval, judge

EV = {"metric": "reconstruction.explained_variance", "value": 0.86, "low": 0.84, "high": 0.90}


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (0.86, "reproduced"), (0.84, "reproduced"), (0.90, "reproduced"),
        (0.8399, "not reproduced"), (0.9001, "not reproduced"), (None, "not comparable"),
    ],
)  # fmt: skip
def test_a_value_is_judged_by_its_range_bounds_included(
    measured: float | None, verdict: str
) -> None:
    (judged,) = judge([EV], {EV["metric"]: measured})
    assert judged["verdict"] == verdict
    assert judged["measured"] == measured
    assert (judged["why"] is None) == (measured is not None)


def test_one_bound_may_be_open() -> None:
    at_most = {"metric": "density.dead_frac", "high": 0.05}
    assert judge([at_most], {"density.dead_frac": 0.0})[0]["verdict"] == "reproduced"
    assert judge([at_most], {"density.dead_frac": 0.06})[0]["verdict"] == "not reproduced"
    at_least = {"metric": "density.dead_frac", "low": 0.05}
    assert judge([at_least], {"density.dead_frac": 0.06})[0]["verdict"] == "reproduced"


def test_what_was_measured_otherwise_is_never_judged_but_shown() -> None:
    entry = {"metric": "reconstruction.mse", "value": 0.0027, "comparable": False, "why": "unit"}
    (judged,) = judge([entry], {"reconstruction.mse": 0.0027})
    assert judged["verdict"] == "not comparable"
    assert judged["measured"] == 0.0027
    assert judged["why"] == "unit"


def test_what_was_not_measured_says_so() -> None:
    (judged,) = judge([EV], {})
    assert judged["verdict"] == "not comparable"
    assert judged["measured"] is None
    assert judged["why"] == "not measured by this run"


@pytest.mark.parametrize(
    ("measured", "lo", "hi", "said"),
    [
        (0.86, 0.85, 0.87, None), (0.86, 0.83, 0.87, "out of"), (0.89, 0.88, 0.91, "out of"),
        (0.83, 0.82, 0.835, None), (0.83, 0.82, 0.85, "into"), (0.95, 0.80, 0.96, "into"),
    ],
)  # fmt: skip
def test_an_interval_across_a_bound_is_said(
    measured: float, lo: float, hi: float, said: str | None
) -> None:
    ci = {EV["metric"]: {"se": 0.01, "lo": lo, "hi": hi, "n": 9}}
    (judged,) = judge([EV], {EV["metric"]: measured}, ci)
    assert (judged["why"] is None) if said is None else (said in judged["why"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 0.9, "high": 0.8}, "expected[1].low=0.9: must be <= expected[1].high=0.8"),
        ({"low": 0.87}, "expected[1].value=0.86: outside its own range [0.87, 0.9]"),
        ({"low": None, "high": None}, "expected[1].low needs a value"),
        ({"lo": 0.8}, "no key 'expected[1].lo'. Did you mean 'low'?"),
        ({"comparable": False}, "expected[1].why needs a value"),
        ({"value": "86%"}, "expected[1].value=86%: must be int or float"),
        ({"value": True}, "expected[1].value=True: must be int or float"),
        ({"high": float("nan")}, "expected[1].high=nan: must be finite"),
        ({"metric": None}, "expected[1].metric=None: must be str"),
    ],
)
def test_a_block_that_says_nothing_is_refused_by_key(change: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_expected([EV, EV | change])
    assert str(error.value).startswith(message)


def test_entries_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected\[0\]=0.86: must be a mapping"):
        check_expected([0.86])


def test_interval_is_written_as_read() -> None:
    assert interval(0.84, 0.9) == "[0.84, 0.9]"
    assert interval(0.84, None) == ">= 0.84"
    assert interval(None, 0.9) == "<= 0.9"
    assert interval(None, None) == ""
