import json
import sys

import benchmark
import pytest
import torch
from benchmarks import evaluating, step_sides
from benchmarks.results import Ratio, Result, times_as_fast
from benchmarks.rows import Directions, HeldRows

ASKED = {"d_in": 16, "d_sae": 80, "batch": 64, "k": 3, "steps": 4, "device": "cpu",
         "auxk": False, "clip": False, "unit": False}  # fmt: skip


@pytest.mark.parametrize("extra", ["none", "unit", "clip", "auxk"])
def test_sides_of_a_step_do_the_same_work(extra):
    asked = ASKED | ({extra: True} if extra != "none" else {})
    sides = ["dense", "sparsify", "torch-fp32", "torch-screened", "native-fp32"]
    found = {side: step_sides.prepare({**asked, "side": side})() for side in sides}
    for side in sides[1:]:
        # Of AuxK sparsify gives the encoder no gradient.
        close = 2e-3 if (extra, side) == ("auxk", "sparsify") else 1e-6
        assert found[side]["fvu"] == pytest.approx(found["dense"]["fvu"], rel=close)
        assert found[side]["seconds"] > 0
    if extra != "none":
        plain = step_sides.prepare({**ASKED, "side": "dense"})()
        assert found["dense"]["fvu"] != pytest.approx(plain["fvu"], rel=1e-7)


def test_sparsify_gives_the_encoder_no_gradient_of_auxk():
    asked = ASKED | {"auxk": True, "side": "sparsify", "k": 1}
    x = Directions(16).rows(64)
    side, other = step_sides.Sparsify(asked, x), step_sides.Dense({**asked, "side": "dense"}, x)
    side.step(x), other.step(x)
    only_dead = slice(0, 80 // step_sides.DEAD_SHARE)
    assert other.W_enc.grad[only_dead].norm() > side.W_enc.grad[only_dead].norm()
    assert side.W_dec.grad == pytest.approx(other.W_dec.grad, abs=1e-6)


def test_the_bound_is_the_sum_of_its_parts():
    found = step_sides.prepare({**ASKED, "side": "bound", "steps": 1})()
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))
    assert found["parts"].keys() == {"product", "Adam", "gathers"}


def test_ratios_are_of_pairs():
    times = {"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 1.0]}
    assert times_as_fast(times, "fast", "slow") == 3.0


def test_checks_hold_ratios_to_bounds():
    result = Result("", [Ratio("a:b", 3.0, "least"), Ratio("c:memory", 0.5, "most")], {})
    assert result.misses("2") is None and result.misses("a:b=3") is None
    assert result.misses("4") == "a:b is 3: misses --check 4"
    assert result.misses("c:memory=0.6") is None
    assert result.misses("c:memory=0.4") == "c:memory is 0.5: misses --check c:memory=0.4"
    with pytest.raises(ValueError, match="no ratio 'x'; there are a:b, c:memory"):
        result.misses("x=1")


def test_evaluating_sees_every_row():
    asked = {"d": 16, "d_sae": 128, "k": 4, "batch_size": 32, "device": "cpu", "n_rows": 100}
    found = evaluating.prepare(asked)()
    assert found["rows_per_s"] > 0 and found["of_encoding"] > 0


def test_rows_are_of_the_directions_that_are_said():
    source = Directions(256)
    x = source.rows(500)
    expected = 16 * (1 + 1 / 12) + 256 * 0.05**2
    assert float(x.square().sum(1).mean()) == pytest.approx(expected, rel=0.05)
    assert not torch.equal(x, source.rows(500))
    assert HeldRows(x).stats().mean_square_norm == pytest.approx(float(x.square().sum(1).mean()))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["step", "--shape", "1,2"], "d_in,d_sae,batch,k"),
        (["store", "model=toy"], "store takes no model=toy"),
        (["cache", "nonsense"], "unknown: nonsense"),
        (["step", "--sides", "dense,pilfer"], "no side 'pilfer'"),
    ],
)
def test_bad_words_are_refused(monkeypatch, capsys, words, complaint):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_from_the_command_line(monkeypatch, capsys, tmp_path):
    words = ["step", "--shape", "quick", "--sides", "dense,torch-fp32,bound", "--repeats", "2"]
    out = tmp_path / "step.json"
    wanted = [*words, "--out", str(out), "--check", "torch-fp32:dense=1e9"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *wanted])
    with pytest.raises(SystemExit, match="misses --check torch-fp32:dense=1e9"):
        benchmark.main()
    found = json.loads(out.read_text())
    assert len(found["sides"]["torch-fp32"]["seconds"]) == 2
    assert found["ratios"].keys() >= {"torch-fp32:dense", "torch-fp32:bound", "torch-fp32:memory"}
    assert found["machine"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "torch-fp32" in printed and f"torch {torch.__version__}" in printed
