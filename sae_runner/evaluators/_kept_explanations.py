"""Explanations as an evaluation keeps them, and as another takes them over to score on its data.

They lie in `explanations.json` beside the tables: of each latent the text, the rule that its
back-end predicts by, and the ids of the examples that it was explained from. Whose latents they
are of, and on which data, is in the evaluator's envelope.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_runner.errors import ConfigError
from sae_runner.evaluators._explainers.base import Case, Explainer, Explanation

SCHEMA = "sae-run.explanations/1"
FILE = "explanations.json"
TYPE = "autointerp"


class Kept(NamedTuple):
    """One latent's explanation."""

    explanation: Explanation
    explained: list[int]
    """Ids of the examples that it is from."""


class Source(NamedTuple):
    """Explanations of another evaluation."""

    folder: Path
    """Where they lie: the evaluator's own."""
    sha256: str
    """Of the file."""
    weights: set[str]
    """Hashes of the SAE that they are of, as it lies there and as its own library has it."""
    host: str
    """Fingerprint of the model."""
    data: str
    """Fingerprint of the dataset."""
    latents: dict[int, Kept]


def written(
    kind: str,
    explainer: Explainer,
    cases: Sequence[Case],
    explanations: Sequence[Explanation | None],
) -> str:
    """The text of `explanations.json`; latents without an explanation are left out.

    Args:
        kind: type of the back-end.
        explainer: the back-end.
        cases: the latents.
        explanations: of each.
    """
    latents = [
        {
            "feature": case.latent, "text": explanation.text, "rule": explainer.kept(explanation),
            "explain_ids": [shown.example_id for shown in case.explain],
        }
        for case, explanation in zip(cases, explanations, strict=True) if explanation is not None
    ]  # fmt: skip
    found = {"schema": SCHEMA, "backend": kind, "common": explainer.common(), "latents": latents}
    return json.dumps(found, ensure_ascii=False) + "\n"


def read_source(where: str, kind: str, explainer: Explainer) -> Source:
    """What an evaluation kept; the back-end is told what its explanations have in common.

    Args:
        where: a run, the folder of one of its evaluations, or an evaluator's envelope in it.
        kind: type of the back-end that is to predict from them.
        explainer: the back-end.

    Raises:
        ConfigError: there are none, they are another back-end's, or they are damaged.
    """
    path, envelope = _envelope_at(where, kind)
    place = path.parent / str(envelope["artifacts"]["texts"][FILE])
    try:
        data = place.read_bytes()
        found = json.loads(data)
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']!r}")
        if (other := found["backend"]) != kind:
            raise ConfigError(
                f"explanations={where}: {path.name} is of backend {other}, and "
                f"backend.type={kind} cannot predict from its explanations"
            )
        explainer.shared = found["common"]
        latents = {
            int(one["feature"]): Kept(
                explainer.recalled(str(one["text"]), one["rule"]), [*map(int, one["explain_ids"])]
            )
            for one in found["latents"]
        }
        sae = envelope["sae"]
        weights = {str(sae["sha256"]), *map(str, filter(None, [sae.get("source_sha256")]))}
        host, of = str(envelope["host"]["fingerprint"]), str(envelope["data"]["fingerprint"])
    except ConfigError:
        raise
    except (OSError, LookupError, TypeError, ValueError) as error:
        why = " ".join(repr(error).split())
        raise ConfigError(f"explanations={where}: {place} is damaged: {why}") from None
    if not latents:
        raise ConfigError(f"explanations={where}: no latent was explained there")
    return Source(place.parent, hashlib.sha256(data).hexdigest(), weights, host, of, latents)


def _envelope_at(where: str, kind: str) -> tuple[Path, dict[str, Any]]:
    """The one evaluator with explanations, of a back-end's if there are several.

    Raises:
        ConfigError: there is none, or more than one.
    """
    path = Path(where).expanduser().absolute()
    if not path.exists():
        raise ConfigError(f"explanations={where}: there is no such folder")
    steps = sorted(path.glob("eval/step_*"), key=lambda p: int("0" + p.name[5:]), reverse=True)
    found: list[tuple[Path, dict[str, Any]]] = []
    for folder in steps or [path]:
        files = [folder] if folder.is_file() else sorted(folder.glob("*.json"))
        found = [(file, known) for file in files if (known := _explained(file))]
        if found:
            break
    if len(found) > 1:
        found = [one for one in found if _kind(one[1]) == kind] or found
    if len(found) > 1:
        names = ", ".join(str(file) for file, _ in found)
        raise ConfigError(f"explanations={where}: means several evaluations; use one of {names}")
    if not found:
        raise ConfigError(
            f"explanations={where}: no explanations are kept there; `sae-run eval checkpoint=RUN "
            "evaluators=[autointerp]` makes them (force=true where an older one kept none)"
        )
    return found[0]


def _explained(path: Path) -> dict[str, Any] | None:
    """An envelope of `autointerp` that kept explanations; None of anything else."""
    try:
        envelope = json.loads(path.read_bytes())
        known = envelope["type"] == TYPE and FILE in envelope["artifacts"]["texts"]
    except (OSError, LookupError, TypeError, ValueError):
        return None
    return dict(envelope) if known else None


def _kind(envelope: Mapping[str, Any]) -> Any:
    return envelope.get("config", {}).get("backend", {}).get("type")
