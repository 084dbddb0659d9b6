"""What raters handed back: responses.jsonl of a pack's page, read and checked.

One JSON object a line: pack, rater, item, repeat (0, or 1 where the item was shown again), the
scores of `SCORES` (whole numbers from 0, or null where the rater gave none), interpretation,
seconds.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_runner.errors import ConfigError

SCORES = {
    "confidence": 3, "activation_consistency": 5, "logit_consistency": 3, "specificity": 3,
    "interpretable": 1,
}  # fmt: skip
"""The most each score can be (Bricken et al. 2023: four make a total of 14; the last is apart)."""
TOTAL = tuple(SCORES)[:-1]
OTHERS: dict[str, Any] = {
    "pack": str, "rater": str, "item": str, "repeat": int, "interpretation": str,
    "seconds": (int, float),
}  # fmt: skip


class Response(NamedTuple):
    """One rating of one item."""

    pack: str
    rater: str
    item: str
    repeat: int
    scores: dict[str, int | None]
    interpretation: str
    seconds: float

    def total(self, names: Sequence[str]) -> int | None:
        """The sum of some scores; None where one is missing."""
        given = [self.scores[name] for name in names]
        return None if None in given else sum(v for v in given if v is not None)


def read_responses(paths: Sequence[Path]) -> list[Response]:
    """All responses of some files.

    Raises:
        ConfigError: a file that is damaged, lacks fields, has scores out of range, or mixes packs.
    """
    found: dict[tuple[str, str, int], str] = {}
    responses: list[Response] = []
    for path in paths:
        try:
            # A rater's text may hold what Python also calls an end of line: U+2028, U+0085.
            lines = path.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"responses={path}: cannot be read: {error}") from None
        if not any(line.strip() for line in lines):
            raise ConfigError(f"responses={path}: it is empty")
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"responses={path}: line {number}"
                response = checked(line, where)
                key = (response.rater, response.item, response.repeat)
                if key in found:
                    raise ConfigError(
                        f"{where}: rater {response.rater} has rated item {response.item} at "
                        f"{found[key]} already"
                    )
                found[key] = f"line {number} of {path.name}"
                responses.append(response)
    if len(packs := sorted({response.pack for response in responses})) > 1:
        raise ConfigError(f"responses: they are of several packs: {', '.join(packs)}; give one's")
    return responses


def checked(line: str, where: str) -> Response:
    """The response on one line.

    Raises:
        ConfigError: see `read_responses`.
    """
    try:
        value = json.loads(line)
    except ValueError:
        raise ConfigError(f"{where}: it is no JSON; was the file cut short?") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: it is no response: {line[:40]}")
    for key in (*OTHERS, *SCORES):
        if key not in value:
            raise ConfigError(f"{where}: it lacks {key!r}")
    for key, kind in OTHERS.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise ConfigError(f"{where}: {key}={value[key]!r}: is a {type(value[key]).__name__}")
    if value["repeat"] not in (0, 1):
        raise ConfigError(f"{where}: repeat={value['repeat']}: not 0 or 1")
    for key, most in SCORES.items():
        score = value[key]
        is_score = isinstance(score, int) and not isinstance(score, bool) and 0 <= score <= most
        if score is not None and not is_score:
            raise ConfigError(f"{where}: {key}={score!r}: not from 0 to {most}, or null")
    scores = {key: value[key] for key in SCORES}
    return Response(
        value["pack"], value["rater"], value["item"], value["repeat"], scores,
        value["interpretation"], float(value["seconds"]),
    )  # fmt: skip
