"""What a reader of a report must not miss."""

from sae_runner.report.assemble import warnings_of


def test_warnings_name_what_is_not_in_the_data():
    facts = {"model": {"weights": "openai"}, "dataset": {"n_unreadable": 0}}
    assert warnings_of(facts) == []
    facts = {
        "model": {"weights": "random"}, "dataset": {"n_unreadable": 2, "n_missing_rows": 1234},
    }  # fmt: skip
    random, unreadable, missing = warnings_of(facts)
    assert "RANDOM" in random and unreadable.endswith(": 2") and missing.endswith(": 1,234")
