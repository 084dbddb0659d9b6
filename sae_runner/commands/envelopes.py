"""An evaluator's findings as they are kept, and whether they are still what would be found."""

import datetime
import json
import logging
from pathlib import Path
from typing import Any

from sae_runner.commands.pipeline import Pipeline
from sae_runner.config import plain
from sae_runner.evaluators.base import Evaluator, Findings
from sae_runner.report.assemble import artifacts_of
from sae_runner.report.schema import EVAL_SCHEMA, check_envelope

log = logging.getLogger("sae_runner")


def is_current(
    path: Path, pipeline: Pipeline, name: str, evaluator: Evaluator, facts: dict[str, Any]
) -> bool:
    """Whether an envelope was made by the same evaluator, options, rows and weights."""
    try:
        envelope = json.loads(path.read_text())
        check_envelope(envelope, str(path))
    except FileNotFoundError:
        return False
    except json.JSONDecodeError as error:
        log.warning("%s is measured again: %s is no JSON: %s", name, path, error)
        return False
    except ValueError as error:
        log.warning("%s is measured again: %s", name, error)
        return False
    found = (envelope["evaluator_version"], envelope["config"], envelope["sae"]["sha256"])
    if envelope.get("incomplete"):
        return False
    config = config_of(pipeline, name, bounded="keep_gb" in envelope["config"].get("eval", {}))
    same: bool = found == (evaluator.version, config, facts["sha256"]["sae.safetensors"])
    return same


def config_of(pipeline: Pipeline, name: str, *, bounded: bool) -> dict[str, Any]:
    """All that decides an evaluator's findings besides rows and weights.

    What may be kept in memory does only where it was `bounded`: where examples were left out.
    """
    evaluator, options = pipeline.evaluators[name], pipeline.eval_options._asdict()
    keys = (*evaluator.sizes, *(["keep_gb"] if bounded else []), "seed")
    sizes = {key: options[key] for key in keys}
    found = {**plain(pipeline.cfg["evaluators"][name]), "eval": sizes}
    reads = evaluator.reads()
    return {**found, "reads": reads} if reads else found


def envelope_of(
    name: str,
    evaluator: Evaluator,
    findings: Findings,
    pipeline: Pipeline,
    facts: dict[str, Any],
    folder: Path,
    cost: dict[str, Any],
) -> dict[str, Any]:
    """An evaluator's findings with everything needed to know what they are of."""
    site = pipeline.site
    return {
        "schema": EVAL_SCHEMA,
        "evaluator": name,
        "type": str(pipeline.cfg["evaluators"][name]["type"]),
        "evaluator_version": evaluator.version,
        "axis": evaluator.axis,
        "run_id": folder.parent.parent.name,
        "timestamp_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": pipeline.eval_options.seed,
        "host": facts["model"],
        "site": {"name": site.name, "module": site.module, "d": site.d, "tokens": facts["tokens"]},
        "sae": {
            **facts["sae"],
            "checkpoint": folder.name,
            "sha256": facts["sha256"]["sae.safetensors"],
            # Of another library's SAE: what its own file is.
            **({"source_sha256": facts["source"]["sha256"]} if "source" in facts else {}),
        },
        "data": {
            **facts["dataset"],
            "split": "heldout",
            "n_tokens": cost["rows"] if evaluator.reads_rows() else 0,
            **({"n_examples": cost["full_forwards"]} if evaluator.splices else {}),
        },
        "config": config_of(pipeline, name, bounded=findings.left_out),
        "metrics": findings.metrics,
        "ci": findings.ci,
        "notes": [note._asdict() for note in findings.notes],
        "series": findings.series,
        "artifacts": artifacts_of(name, findings),
        "cost": cost,
        **({"incomplete": findings.incomplete} if findings.incomplete else {}),
    }
