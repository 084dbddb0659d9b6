"""Yes-or-no questions about a text that the text itself answers: tasks without any labels."""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NUMBERS = "one|two|three|four|five|six|seven|eight|nine|ten|hundred|thousand|million"
PATTERNS = {
    "digit": r"[0-9]",
    "number": rf"[0-9]|(?i:\b(?:{NUMBERS})\b)",
    "comma": r",",
    "quote_or_parenthesis": r"[\"“”()]|``|''",
    "negation": r"(?i:\b(?:not|no|never|nothing|nobody|none|neither|nor|nowhere|without|cannot)\b"
                r"|n't\b)",
    "contrast": r"(?i:\b(?:but|although|though|however|yet|despite)\b)",
    "conjunction": r"(?i:\band\b)",
    "possessive_or_is": r"(?i:'s\b)",
    "first_word_determiner": r"(?i:^\W*(?:the|an?|this|that|these|those|its|his|her|their|my|our"
                             r"|your|some|any|every|each|no|all|both)\b)",
    "first_word_pronoun": r"(?i:^\W*(?:i|you|he|she|it|we|they|there|who|what)\b)",
    "first_person": r"(?i:\b(?:i|me|my|mine|we|us|our|ours)\b)",
    "second_person": r"(?i:\b(?:you|your|yours|yourself)\b)",
    "capital_inside": r"(?<=[\w,;:'’)] )[A-Z]",
    "final_punctuation": r"[.!?][\"'”’)\s]*$",
    "question": r"\?",
}  # fmt: skip
"""What a text contains; `first_word_*`: what it begins with."""
COMPILED = {name: re.compile(pattern) for name, pattern in PATTERNS.items()}
LENGTH = "longer_than_median"
"""More words than the median of the train set."""


def answers(texts: Sequence[str], median: float) -> dict[str, npt.NDArray[np.bool_]]:
    """Yes or no for each text, by task; `median` is that of the words of the train set's texts."""
    found = {
        name: np.array([bool(pattern.search(text)) for text in texts], dtype=bool)
        for name, pattern in COMPILED.items()
    }
    return {LENGTH: n_words(texts) > median, **found}


def n_words(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """How many words each text has, cut at white space."""
    return np.array([len(text.split()) for text in texts], dtype=np.int64)
