import pytest

from sae_runner.evaluators._explainers import _prompts
from sae_runner.evaluators._explainers._prompts import numbers_of, ratings_of, sentence_of


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("1, 3", [1, 3]),
        ("3,1,3.", [1, 3]),
        (" 2 ", [2]),
        ("1, 2 and 5", [1, 2, 5]),
        ("[1, 4]", [1, 4]),
        ("Answer: 2, 3", [2, 3]),
        ("None", []),
        ("none.", []),
        ("6", None),
        ("0, 1", None),
        ("", None),
        ("all of them", None),
        ("1, 2 perhaps", None),
        ("Excerpts 1 and 2 contain none", None),
    ],
)
def test_lists_of_numbers(reply, numbers):
    assert numbers_of(reply, 5) == numbers


@pytest.mark.parametrize(
    ("reply", "ratings"),
    [
        ("[0, 10, 2.5]", [0, 10, 2.5]),
        ("Here: ```json\n[1,2,3]\n```", [1, 2, 3]),
        ("[1, 2]", None),
        ("[1, 2, 11]", None),
        ("[1, 2, true]", None),
        ('[1, 2, "3"]', None),
        ("1, 2, 3", None),
        ("[1, 2, 3", None),
    ],
)
def test_ratings(reply, ratings):
    assert ratings_of(reply, 3) == ratings


def test_explanations_are_one_line_and_not_too_long():
    assert sentence_of(" Words\nabout  plums. ") == "Words about plums."
    assert sentence_of(" …\n") is None
    assert len(sentence_of("a " * 1000)) == 400


def test_excerpts_are_numbered_lines():
    assert _prompts.excerpts([" a\nb ", "c"]) == "1. a b\n2. c"
    assert "1. x" in _prompts.detect("it", ["x"]) and "to: it" in _prompts.detect("it", ["x"])
    assert _prompts.simulate("it", ['"', "\n"]).endswith('["\\"", "\\n"]')
