"""What a language model is asked, and what counts as an answer."""

import json
import re
from collections.abc import Sequence

VERSION = "1"
"""Raised when a wording or a rule for replies changes."""

MARKS = ("<<", ">>")
EXPLAIN = """Below are excerpts of text. Tokens marked {begin}like this{end} activate one unit \
of a neural network. In one sentence, say what the marked tokens, or the texts around them, share. \
Answer with that sentence alone.

{excerpts}"""
DETECT = """A unit of a neural network responds to: {explanation}

Which of the numbered excerpts contain that? Answer with their numbers, separated by commas, or \
with None.

{excerpts}"""
FUZZ = """A unit of a neural network responds to: {explanation}

In which of the numbered excerpts are the right tokens marked {begin}like this{end}? Answer with \
their numbers, separated by commas, or with None.

{excerpts}"""
SIMULATE = """A unit of a neural network responds to: {explanation}

For each token of the text, how strongly does the unit respond, from 0 (not at all) to 10? Answer \
with a JSON list of {n} numbers, one for each token.

{tokens}"""
LONGEST_EXPLANATION = 400
"""Characters."""


def excerpts(texts: Sequence[str]) -> str:
    """Texts with numbers from 1, one after another."""
    lines = (" ".join(text.split("\n")).strip() for text in texts)
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def explain(texts: Sequence[str]) -> str:
    """Ask what marked excerpts share."""
    return EXPLAIN.format(begin=MARKS[0], end=MARKS[1], excerpts=excerpts(texts))


def detect(explanation: str, texts: Sequence[str]) -> str:
    """Ask which excerpts fit."""
    return DETECT.format(explanation=explanation, excerpts=excerpts(texts))


def fuzz(explanation: str, texts: Sequence[str]) -> str:
    """Ask in which excerpts the marks fit."""
    return FUZZ.format(
        explanation=explanation, begin=MARKS[0], end=MARKS[1], excerpts=excerpts(texts)
    )


def simulate(explanation: str, pieces: Sequence[str]) -> str:
    """Ask how strongly each token activates."""
    tokens = json.dumps(list(pieces), ensure_ascii=False)
    return SIMULATE.format(explanation=explanation, n=len(pieces), tokens=tokens)


def sentence_of(reply: str) -> str | None:
    """An explanation: the reply in one line, cut where it is long; None of nothing."""
    text = " ".join(reply.split())
    return text[:LONGEST_EXPLANATION] if re.search(r"\w", text) else None


def numbers_of(reply: str, n: int) -> list[int] | None:
    """The numbers of a list such as `1, 3 and 4.`, or none of `None`; None of anything else."""
    text = re.sub(r"(?i)^\W*answers?\b\W*", "", reply.strip()).strip(" .[]()*`\n")
    if re.fullmatch(r"(?i)none", text):
        return []
    if not re.fullmatch(r"(?i)\d+(\s*(,|and|,\s*and|\s)\s*\d+)*", text):
        return None
    numbers = sorted({int(number) for number in re.findall(r"\d+", text)})
    return numbers if numbers[0] >= 1 and numbers[-1] <= n else None


def ratings_of(reply: str, n: int) -> list[float] | None:
    """A JSON list of n numbers from 0 to 10, wherever in the reply; None of anything else."""
    found = re.search(r"\[[^\[\]]*\]", reply)
    try:
        values = json.loads(found[0]) if found else None
    except ValueError:
        return None
    if not isinstance(values, list) or len(values) != n:
        return None
    if not all(type(v) in (int, float) and 0 <= v <= 10 for v in values):
        return None
    return [float(v) for v in values]
