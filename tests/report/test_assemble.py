"""What a reader of a report must not miss."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_runner.evaluators.base import Findings
from sae_runner.report.assemble import headline, warnings_of, write_findings


def test_what_an_evaluator_has_no_more_is_removed_and_what_it_keeps_is_not(tmp_path: Path):
    def files() -> set[str]:
        return {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}

    found = Findings(
        {}, per_latent={"freq": np.zeros(2)}, tables={"items": {"a": [1]}, "tasks": {"a": [1]}},
        arrays={"topk": {"act": torch.zeros(1)}}, texts={"pack.html": "<p>"},
    )  # fmt: skip
    write_findings(tmp_path, "human", found)
    write_findings(tmp_path, "other", found)
    others = {name for name in files() if name.startswith("other")}
    (tmp_path / "human" / "answers.jsonl").write_text("dear")
    write_findings(tmp_path, "human", Findings({}, tables={"tasks": {"a": [2]}}))
    kept = {"human/answers.jsonl", "human/tasks.parquet", "human/pack.html"}
    assert len(others) == 5 and files() == others | kept


def test_the_headline_has_what_was_asked_for_by_its_full_name():
    def envelope(kind: str, **metrics: dict[str, Any]) -> dict[str, Any]:
        return {"type": kind, "metrics": metrics}

    evaluators = {
        "downstream_loss": envelope("downstream_loss", downstream_loss={"kl": 0.25, "tv": 0.5}),
        "autointerp": envelope("autointerp", autointerp={"spearman_mean": 0.5}),
        "autointerp_lm": envelope("autointerp", autointerp={"spearman_mean": 0.75}),
        "human": envelope("human", human={"total_median": None}),
        "reconstruction": envelope("reconstruction", reconstruction={"mse": 2.0, "fvu": 0.125}),
        "sparsity": envelope("sparsity", sparsity={"l0": 32.0}),
    }
    found = headline({"evaluators": evaluators})
    assert found == (
        "report: l0 32, fvu 0.125, downstream_loss.kl 0.25, autointerp.spearman_mean 0.5, "
        "autointerp_lm/autointerp.spearman_mean 0.75"
    )
    assert headline({"evaluators": {}}) == "report: no evaluators"


def test_warnings_name_what_is_not_in_the_data():
    facts = {"model": {"weights": "openai"}, "dataset": {"n_unreadable": 0}}
    assert warnings_of(facts) == []
    facts = {
        "model": {"weights": "random"}, "dataset": {"n_unreadable": 2, "n_missing_rows": 1234},
    }  # fmt: skip
    random, unreadable, missing = warnings_of(facts)
    assert "RANDOM" in random and unreadable.endswith(": 2") and missing.endswith(": 1,234")
