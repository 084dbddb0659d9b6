"""N-gram templates; the four cases are those of the tests of openai/sparse_autoencoder."""

import numpy as np
import pytest

from sae_runner.evaluators._explainers._templates import (
    WILDCARD,
    Document,
    Template,
    Trie,
    find_templates,
)

A, B, C, D, E = range(5)
FILLER = 99


def activate_by(rule):
    def activate(latents, rows):
        assert len(latents) == len(rows)
        return np.array([float(rule(list(row))) for row in rows])

    return activate


def trie_of(rule, *documents, longest=32):
    """Of documents (tokens, place of activation), each of activation 1."""
    cut = [Document(0, tuple(tokens[: i + 1]), 1.0) for tokens, i in documents]
    found = find_templates(cut, activate_by(rule), FILLER, longest) if cut else None
    return Trie(found.templates if found else [])


@pytest.mark.parametrize(
    ("rule", "documents", "wanted"),
    [
        (
            lambda row: len(row) == 1,
            [([A, B, C], 0), ([B, C, D], 0)],
            {(A, B, C): [1, 0, 0], (C, B, A): [1, 0, 0]},
        ),
        (
            lambda row: row[-1] == C,
            [([A, B, C], 2), ([B, C, D], 1)],
            {(B, C): [0, 1], (A, A, A): [0, 0, 0], (C, B, C): [1, 0, 1]},
        ),
        (
            lambda row: row[-1] == C and A in row,
            [([A, B, C], 2), ([B, A, C], 2), ([A, C, D], 1)],
            {
                (B, C): [0, 0],
                (A, C): [0, 1],
                (A, E, C, A, C): [0, 0, 1, 0, 1],
                (A, B, B, C): [0, 0, 0, 0],  # A known limitation: no template skips two.
            },
        ),
        (lambda row: 0, [], {(A, B): [0, 0]}),
    ],
    ids=["first position", "one token", "preceded anywhere", "none"],
)
def test_the_cases_of_the_reference(rule, documents, wanted):
    trie = trie_of(rule, *documents)
    for tokens, values in wanted.items():
        assert trie.predict(tokens).tolist() == values, tokens


def test_the_suffix_is_the_shortest_that_keeps_half_and_its_activation_counts():
    acts = {1: 1.9, 2: 2.0, 3: 3.0, 4: 4.0}  # By length: of a0 = 4, half is 2.
    rows_seen = []

    def activate(latents, rows):
        rows_seen.extend(map(tuple, rows))
        return np.array([acts[min(len(row), 4)] if FILLER not in row else 0.0 for row in rows])

    found = find_templates([Document(7, (A, B, C, D), 4.0)], activate, FILLER, 32)
    assert found == ([Template((C, D), 2.0, True)], 0)
    assert rows_seen[:2] == [(D,), (C, D)] and (FILLER, C, D) in rows_seen
    assert (FILLER, D) in rows_seen and (C, FILLER) in rows_seen


def test_a_token_is_a_wildcard_where_more_than_half_is_left_without_it():
    left = {(FILLER, B, C): 0.5, (A, FILLER, C): 0.51, (A, B, FILLER): 0.0}

    def activate(latents, rows):
        whole = {(A, B, C): 1.0, (FILLER, A, B, C): 0.5}
        return np.array([(left | whole).get(tuple(row), 0.0) for row in rows])

    found = find_templates([Document(0, (A, B, C), 1.0)], activate, FILLER, 32)
    assert found.templates == [Template((A, WILDCARD, C), 1.0, False)]


def test_what_is_lost_by_a_mask_is_measured_by_the_suffix_and_by_the_filler_by_the_whole():
    acts = {(D,): 1.0, (C, D): 2.0, (FILLER, C, D): 1.5, (FILLER, D): 1.2}

    def activate(latents, rows):
        return np.array([acts.get(tuple(row), 0.0) for row in rows])

    found = find_templates([Document(0, (A, C, D), 4.0)], activate, FILLER, 32)
    assert found.templates == [Template((WILDCARD, D), 2.0, True)]


def test_a_text_that_no_suffix_explains_is_its_own_template_and_counted():
    silent = activate_by(lambda row: 0)
    documents = [Document(0, (A, B, C, D), 2.0), Document(0, (A,), 3.0)]
    found = find_templates(documents, silent, FILLER, 3)
    assert found.templates == [Template((B, C, D), 2.0, True), Template((A,), 3.0, True)]
    assert found.n_not_reproduced == 2


def test_all_documents_are_run_together():
    calls = []

    def activate(latents, rows):
        calls.append(len(rows))
        return np.array([float(row[-1] == latent) for latent, row in zip(latents, rows)])  # noqa: B905

    documents = [Document(t, (D, D, t), 1.0) for t in (A, B, C)]
    found = find_templates(documents, activate, FILLER, 32)
    assert [t.tokens for t in found.templates] == [(A,), (B,), (C,)]
    assert calls == [3, 3, 3]  # One length, the filler before, each token masked.


def test_the_shortest_match_wins_the_own_branch_comes_first_and_nothing_is_tried_again():
    short, long = Template((C,), 1.0, False), Template((B, C), 2.0, False)
    assert Trie([long, short]).predict([B, C]).tolist() == [0, 1]
    trie = Trie([Template((A, B, C), 3.0, False), Template((D, WILDCARD, C), 4.0, False)])
    assert trie.predict([A, B, C])[2] == 3
    assert trie.predict([D, B, C])[2] == 0  # B's own branch leads nowhere, and there is no return.
    assert trie.predict([D, E, C])[2] == 4
    assert Trie([Template((C,), 1.0, False), Template((C,), 5.0, False)]).predict([C]) == [5]


def test_prediction_can_begin_later_and_still_looks_back():
    trie = Trie([Template((A, C), 2.0, False)])
    assert trie.predict([A, C, A, C], 3).tolist() == [2]
    assert trie.predict([A, C, A, C], 1).tolist() == [2, 0, 2]
