import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sae_runner.checkpoint import load_sae
from sae_runner.commands import report, train
from sae_runner.commands.between import Member, begun_alike
from sae_runner.commands.job import Job
from sae_runner.errors import ConfigError, InputError, StoreError
from sae_runner.report.runs import Run
from sae_runner.report.schema import not_finite

ComposeJob = Callable[..., Job]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, small: tuple[str, ...], compose_job: ComposeJob
) -> Path:
    """Two seeds of one SAE, and one of other data and another width; not to be changed."""
    outputs = tmp_path_factory.mktemp("between") / "outputs"
    for words in (["run_name=a"], ["run_name=b", "seed=1"], ["run_name=other", "dataset.d=8"]):
        evaluators = "evaluators=[sparsity,reconstruction,density]"
        train.main(compose_job("train", *small, evaluators, *words, f"outputs={outputs}"))
    return outputs


@pytest.fixture
def outputs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "outputs"))


@pytest.fixture
def compared(
    outputs: Path, tmp_path: Path, compose_job: ComposeJob
) -> Callable[..., dict[str, Any]]:
    """comparisons.json of runs below `outputs`."""

    def run(names: list[str], *words: str) -> dict[str, Any]:
        runs = ",".join(str(outputs / "train" / name) for name in names)
        job = compose_job("report", f"runs=[{runs}]", f"out={tmp_path / 'out'}", *words)
        report.main(job)
        found: dict[str, Any] = json.loads((tmp_path / "out" / "comparisons.json").read_text())
        assert not list(not_finite(found))
        return found

    return run


Compared = Callable[..., dict[str, Any]]


def test_two_seeds_side_by_side_in_every_file(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(["a", "b"], "compare=[similarity,firing]")
    (similar,), (firing,) = found["similarity"]["found"], found["firing"]["found"]
    for record in (similar, firing):
        assert record["runs"] == ["a", "b"] and record["numbers"] == [1, 2]
        assert record["differ_in"] == ["seed"] and record["notes"] == []
    assert similar["mmcs_12"] > similar["mmcs_random_12"] > 0
    assert (firing["unit"], firing["n_units"]) == ("row", 300)
    assert found["similarity"]["options"]["shared_cosine"] == 0.7
    out = tmp_path / "out"
    head, row = (out / "similarity.csv").read_text().splitlines()
    assert row.split(",")[head.split(",").index("mmcs_12")] == repr(similar["mmcs_12"])
    for text in ((out / "report.md").read_text(), (out / "report.html").read_text()):
        assert "Similarity of dictionaries" in text and "Latents that fire together" in text
        assert f"{similar['mmcs_12']:.4g}" in text and f"{firing['max_corr_mean_21']:.4g}" in text
    printed = capsys.readouterr().out
    assert re.search(r"\n#1 +#2 +seed +0\.\d+", printed)


def test_a_run_is_what_its_copy_is(compared: Compared, outputs: Path) -> None:
    shutil.copytree(outputs / "train" / "a", outputs / "train" / "copy")
    found = compared(["a", "copy"], "compare=[similarity,firing]")
    (similar,), (firing,) = found["similarity"]["found"], found["firing"]["found"]
    for name in ("mmcs_12", "mmcs_21", "pw_mcc", "shared_frac"):
        assert similar[name] == pytest.approx(1, abs=1e-6), name
    assert firing["max_corr_quantiles_12"]["0.05"] == pytest.approx(1)
    assert firing["max_corr_mean_shuffled_12"] < 0.5
    assert firing["max_corr_quantiles_neurons_21"]["0.05"] == pytest.approx(1, abs=1e-5)
    assert firing["max_corr_mean_neurons_shuffled_12"] < 0.5
    found = compared(["a", "copy"], "compare=firing", "firing.neurons=false")["firing"]
    assert found["found"][0] == {k: v for k, v in firing.items() if "neurons" not in k}


def test_only_latents_that_fired_are_compared(compared: Compared, outputs: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = outputs / "train" / "a" / "features.parquet"
    table = pq.read_table(path)
    n_fired = table["n_fired"].to_numpy().copy()
    n_fired[5:] = 0
    place = table.column_names.index("n_fired")
    pq.write_table(table.set_column(place, "n_fired", pa.array(n_fired)), path)
    found = compared(["a", "b"], "compare=similarity")["similarity"]
    assert (found["found"][0]["n_alive_1"], found["found"][0]["shared_frac"] is not None) == (
        5,
        True,
    )
    path.unlink()
    found = compared(["a", "b"], "compare=similarity")["similarity"]
    d_sae = load_sae(outputs / "train" / "a").d_sae
    assert found["found"][0]["n_alive_1"] == d_sae
    assert found["notes"] == [
        "#1 has no column n_fired (evaluator density): all its latents count as alive"
    ]


def test_what_shares_no_space_is_left_out_and_named(compared: Compared) -> None:
    found = compared(["a", "b", "other"], "compare=similarity")["similarity"]
    assert [record["runs"] for record in found["found"]] == [["a", "b"]]
    (note,) = found["notes"]
    assert re.match(
        r"left out, no other run has the same weights, site and width: #\d \(model \w{12}, "
        r"activations, d_in 8\)$", note
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (
            ["a", "other"], ["compare=similarity"],
            r"compare=similarity: no two of these runs have the same weights, site and width: "
            r"#1 \(model \w{12}, activations, d_in (8|16)\); #2 \(.*, d_in (8|16)\)$",
        ),
        (
            ["a", "other"], ["compare=firing"],
            r"compare=firing: no two of these runs have stored rows of the same data: #\d \(data ",
        ),
        (["a"], ["compare=similarity"], r"compare=similarity: no two of these runs have"),
        (["a", "b"], ["compare=proxy"], r"compare=proxy: needs 10 runs or more \(proxy.min_ru"),
        (["a", "b"], ["compare=[proxi]"], r"compare=proxi: not one of its values. Did you mean"),
        (["a"], ["similarity.shared_cosine=2"], r"similarity.shared_cosine=2.*: must be <= 1"),
        (["a"], ["attribution.seed=-1"], r"attribution.seed=-1.*: must be >= 0"),
        (["a"], ["+firing.n_row=2"], r"no key 'firing.n_row'. Did you mean 'n_rows'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line_and_nothing_is_written(
    compared: Compared, tmp_path: Path, names: list[str], words: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        compared(names, *words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_store_that_is_gone_or_streamed_or_rewritten_is_said(
    made: Path, compared: Compared, outputs: Path
) -> None:
    # The rows lie where they were written, or beside the runs where all was moved.
    compared(["a", "b"], "compare=firing")
    for path in (outputs / "stores").glob("*/store.json"):
        path.write_text(re.sub(r'("fingerprint": ")\w{4}', r"\1beef", path.read_text()))
    moved = made.rename(made.with_name("moved"))
    try:
        with pytest.raises(ConfigError, match=r"#1: its store .* was written again, from another"):
            compared(["a", "b"], "compare=firing")
        shutil.rmtree(outputs / "stores")
        with pytest.raises(ConfigError, match=r"its store .* is gone; `sae-run eval checkpoint="):
            compared(["a", "b"], "compare=firing")
    finally:
        moved.rename(made)


def test_a_checkpoint_that_was_not_measured_is_left_out(compared: Compared, outputs: Path) -> None:
    shutil.copytree(outputs / "train" / "a", outputs / "train" / "c")
    for name, source in (("b", "a"),):
        checkpoints = outputs / "train" / name / "checkpoints"
        shutil.rmtree(checkpoints)
        shutil.copytree(outputs / "train" / source / "checkpoints", checkpoints)
    found = compared(["a", "b", "c"], "compare=similarity")["similarity"]
    assert [record["runs"] for record in found["found"]] == [["a", "c"]]
    assert any("is not what its report was measured on" in note for note in found["notes"])


def test_what_is_no_longer_asked_for_goes(compared: Compared, tmp_path: Path) -> None:
    compared(["a", "b"], "compare=[similarity,firing]")
    found = compared(["a", "b"], "compare=similarity")
    assert "firing" not in found and not (tmp_path / "out" / "firing.csv").exists()
    with pytest.raises(FileNotFoundError):
        compared(["a", "b"])


def explain(run: Path, name: str, *, takes: str | None = None, **scores: float) -> str:
    """Scores as `autointerp` leaves them, in the report too; the hash of what it explained."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    report = json.loads((run / "report.json").read_text())
    checkpoint = report["run"]["checkpoint"]
    folder = run / "eval" / checkpoint / name
    folder.mkdir()
    features = [int(key[1:]) for key in scores]
    columns = {"feature": features, "scored": [True] * len(scores), "spearman": [*scores.values()]}
    pq.write_table(pa.table(columns), folder / "latents.parquet")
    artifacts = {"tables": {"latents": f"{name}/latents.parquet"}}
    kept = folder / "explanations.json"
    kept.write_text(str(scores))
    if takes is None:
        artifacts["texts"] = {kept.name: f"{name}/{kept.name}"}
    envelope = report["evaluators"]["density"] | {
        "evaluator": name, "type": "autointerp", "metrics": {}, "ci": {}, "notes": [],
        "artifacts": artifacts, "config": {"reads": {"explanations": takes}} if takes else {},
    }  # fmt: skip
    report["evaluators"][name] = envelope
    (run / "report.json").write_text(json.dumps(report))
    return hashlib.sha256(kept.read_bytes()).hexdigest()


def test_explanations_of_one_corpus_scored_on_others(compared: Compared, outputs: Path) -> None:
    a, b, c = (outputs / "train" / name for name in ("a", "copy", "third"))
    for run in (b, c):
        shutil.copytree(a, run)
    nobody = "compare=retention: no run scored the explanations of another of these .*: "
    with pytest.raises(ConfigError, match=nobody + "none of them has scores of explanations"):
        compared(["a", "copy"], "compare=retention")
    source = explain(a, "autointerp", f1=0.3, f2=0.5)  # Less than elsewhere.
    with pytest.raises(ConfigError, match=nobody + r"left out, #1 autointerp: its explanations"):
        compared(["a", "copy"], "compare=retention")
    explain(b, "here", takes=source, f1=0.4, f2=0.5)
    explain(b, "other", takes="f" * 64, f1=0.4)
    explain(c, "autointerp", takes=source, f1=0.8, f2=0.1)
    found = compared(["a", "copy", "third"], "compare=retention")["retention"]
    one, two = found["found"]
    assert (one["runs"], one["evaluators"]) == (["a", "copy"], ["autointerp", "here"])
    assert two["runs"] == ["a", "third"] and one["data"] == ["toy", "toy"]
    assert one["retention"] == pytest.approx((4 / 3 + 1) / 2)
    assert two["retention"] == pytest.approx((8 / 3 + 0.2) / 2)
    for record in (one, two):
        assert record["uni_interp"] == pytest.approx((0.4 + 0.1) / 2)
        assert record["active_overlap"] == 1 and record["notes"] == []
    assert found["notes"] == [
        "left out, #2 other: the explanations that it scored are of none of these runs"
    ]
    (a / "eval" / one_checkpoint(a) / "autointerp" / "latents.parquet").write_text("broken")
    with pytest.raises(StoreError, match=r"latents\.parquet cannot be read"):
        compared(["a", "copy"], "compare=retention")


def attribute(run: Path, *, token: int = 0, **more: Any) -> Path:
    """Attributions as the evaluator leaves them, in the report too; where they lie."""
    import numpy as np
    from safetensors.numpy import save_file

    report = json.loads((run / "report.json").read_text())
    d_sae, generator = load_sae(run).d_sae, np.random.default_rng(0)
    path = run / "eval" / report["run"]["checkpoint"] / "attribution" / "attributions.safetensors"
    path.parent.mkdir(exist_ok=True)
    n = np.arange(200)
    save_file({
        "example_id": n // 5, "position": n.astype(np.int32) % 5,
        "next_token": (n + token).astype(np.int32), "offsets": np.arange(201) * 2,
        "indices": generator.integers(0, d_sae, 400).astype(np.int32),
        "values": generator.standard_normal(400).astype(np.float32),
        "neurons": generator.standard_normal((200, 3)).astype(np.float16), **more,
    }, path)  # fmt: skip
    report["evaluators"]["attribution"] = report["evaluators"]["density"] | {
        "evaluator": "attribution", "type": "attribution", "metrics": {}, "ci": {}, "notes": [],
        "artifacts": {"arrays": {"attributions": "attribution/attributions.safetensors"}},
    }  # fmt: skip
    (run / "report.json").write_text(json.dumps(report))
    return path


def test_what_latents_say_is_compared_where_both_runs_kept_it(
    compared: Compared, outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (outputs / "train" / name for name in "ab")
    nobody = r"compare=attribution: no two of these runs have attributions on the same data: "
    with pytest.raises(ConfigError, match=nobody + r"left out, #1: it kept none; `sae-run eval ch"):
        compared(["a", "b"], "compare=attribution")
    attribute(a)
    with pytest.raises(ConfigError, match=nobody + r"#1 \(data \w{12}\); left out, #2: it kept no"):
        compared(["a", "b"], "compare=attribution")
    attribute(b)
    found = compared(["a", "b"], "compare=attribution")["attribution"]
    (record,), options = found["found"], found["options"]
    assert (
        options == {"neurons": True, "seed": 0}
        and record["differ_in"] == ["seed"]
        and record["notes"] == []
    )
    assert (record["unit"], record["n_units"], record["n_common"]) == ("row", 200, 200)
    assert record["max_corr_quantiles_12"]["0.05"] == pytest.approx(1)
    assert record["max_corr_mean_shuffled_21"] < 0.6
    assert record["max_corr_mean_neurons_21"] == pytest.approx(1)
    assert record["max_corr_mean_neurons_shuffled_12"] < 0.3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Latents that say the same" in page and "200 rows" in page
    assert (tmp_path / "out" / "attribution.csv").is_file()
    assert re.search(r"\n#1 +#2 +seed +1 ", capsys.readouterr().out)
    attribute(b, token=7)
    found = compared(["a", "b"], "compare=attribution")["attribution"]
    assert found["found"][0]["max_corr_mean_12"] is None
    why = (
        "the next token is the same at 0 of 200 common rows: their tokenizers differ, or how texts "
        "begin (model.prepend_bos)"
    )
    assert found["found"][0]["notes"] == [why] and found["notes"] == [f"a and b: {why}"]


def test_rows_whose_next_token_is_another_are_left_out_and_counted(
    compared: Compared, outputs: Path
) -> None:
    import numpy as np

    a, b = (outputs / "train" / name for name in "ab")
    token = np.arange(200, dtype=np.int32)
    token[:30] += 1
    attribute(a)
    attribute(b, next_token=token)
    found = compared(["a", "b"], "compare=attribution")["attribution"]
    why = "the next token differs at 30 of 200 common rows, which are left out"
    assert found["found"][0]["notes"] == [why] and found["notes"] == [f"a and b: {why}"]
    assert found["found"][0]["n_units"] == 170


def test_saes_that_began_alike_are_said_to(compared: Compared, outputs: Path) -> None:
    shutil.copytree(outputs / "train" / "b", outputs / "train" / "copy")  # Of no seed but its own.
    for name in "ab":
        attribute(outputs / "train" / name)
    asked = "compare=[similarity,firing,attribution]"
    for found in notes_of(compared(["b", "copy"], "compare=[similarity,firing]")):
        assert found == []
    for found in notes_of(compared(["a", "b"], asked)):
        assert found == []
    path = outputs / "train" / "b" / "report.json"
    report = json.loads(path.read_text())
    report["config"]["seed"] = 0
    path.write_text(json.dumps(report))
    for (note,) in notes_of(compared(["a", "b"], asked)):
        assert note.startswith("a and b: both SAEs were drawn from seed 0: latents of one number")


@pytest.mark.parametrize(
    ("key", "value", "alike"),
    [
        ("d_in", 64, True), ("d_in", 32, False), ("d_out", 32, False), ("d_sae", 128, False),
        ("seed", 1, False), ("init_from", "elsewhere", False), ("source", {}, False),
        ("model", "another", False),
        ("weights", "a", False),
    ],
)  # fmt: skip
def test_saes_begin_alike_with_one_seed_and_shape(key: str, value: Any, alike: bool) -> None:
    def member(**changes: Any) -> Member:
        own = {"seed": 0, "init_from": None, "d_in": 64, "d_out": 64, "d_sae": 256, "model": "one",
               **changes}  # fmt: skip
        facts = {k: own[k] for k in ("d_in", "d_out", "source") if k in own}
        facts |= {"sae": {"d_sae": own["d_sae"]}, "sha256": {"sae.safetensors": own["weights"]}}
        facts["model"] = {"fingerprint": own["model"]}
        return Member(1, cast(Run, SimpleNamespace(config=own)), Path(), facts)

    found = begun_alike(member(weights="a"), member(**{"weights": "b", key: value}))
    assert bool(found) == alike


def notes_of(comparisons: dict[str, Any]) -> list[list[str]]:
    """What is said of each comparison."""
    return [found["notes"] for name, found in comparisons.items() if name != "schema"]


def test_neurons_that_a_run_did_not_keep_are_null_and_it_says_how_to_get_them(
    compared: Compared, outputs: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    a, b = (outputs / "train" / name for name in "ab")
    attribute(a)
    path = attribute(b)
    save_file({k: v for k, v in load_file(path).items() if k != "neurons"}, path)
    found = compared(["a", "b"], "compare=attribution")["attribution"]
    (record,) = found["found"]
    why = (
        f"#2 kept no attributions of raw coordinates; `sae-run eval checkpoint={b} "
        "evaluators=[attribution]` does"
    )
    assert record["notes"] == [why] and found["notes"] == [f"a and b: {why}"]
    assert record["max_corr_mean_12"] > 0.9
    assert {v for k, v in record.items() if "neurons" in k} == {None}
    assert "neurons →" in (tmp_path / "out" / "report.md").read_text()
    left_out = compared(["a", "b"], "compare=attribution", "attribution.neurons=false")
    (of_latents,) = left_out["attribution"]["found"]
    assert of_latents == {k: v for k, v in record.items() if "neurons" not in k} | {"notes": []}
    assert "neurons →" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("key", "value"), [("indices", 10_000), ("position", 5), ("offsets", 3), ("neurons", 199)]
)
def test_damaged_attributions_are_left_out_and_named(
    compared: Compared, outputs: Path, key: str, value: int
) -> None:
    import numpy as np

    attribute(outputs / "train" / "a")
    damaged = {
        "indices": np.full(400, value, np.int32), "position": np.zeros(value, np.int32),
        "offsets": np.arange(201) * value, "neurons": np.zeros((value, 2), np.float16),
    }  # fmt: skip
    path = attribute(outputs / "train" / "b", **{key: damaged[key]})
    for _ in range(2):
        message = rf"left out, #2: {re.escape(str(path))} cannot be read: \w+"
        with pytest.raises(ConfigError, match=message) as error:
            compared(["a", "b"], "compare=attribution")
        assert "\n" not in str(error.value)
        path.write_bytes(b"broken")


def one_checkpoint(run: Path) -> str:
    return str(json.loads((run / "report.json").read_text())["run"]["checkpoint"])


def test_the_sample_of_rows_is_of_whole_examples_and_seeded(compared: Compared) -> None:
    words = ["compare=firing", "firing.n_rows=50"]
    one = compared(["a", "b"], *words)["firing"]["found"]
    assert one[0]["n_units"] == 50
    assert compared(["a", "b"], *words)["firing"]["found"] == one
    assert compared(["a", "b"], *words, "firing.seed=1")["firing"]["found"] != one
