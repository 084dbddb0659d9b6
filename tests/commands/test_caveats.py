import pytest

from sae_runner.commands.caveats import limit_warnings, warnings_about
from sae_runner.commands.pipeline import Pipeline
from sae_runner.data.digits import Digits

BATCH = 256


@pytest.fixture
def about(compose_job, small):
    def about(n_rows, *words, **facts):
        job = compose_job("train", *small, *words)
        return warnings_about(Pipeline(job.cfg, job.choices), n_rows, **facts)

    return about


def test_nothing_is_said_of_an_ordinary_run(about):
    assert about(2048) == []


@pytest.mark.parametrize(
    ("n_tokens", "window", "fires"),
    # Eight steps: the last one that can see a dead latent comes after 7 * 256 rows.
    [(2048, 7 * BATCH, True), (2048, 7 * BATCH + 1, False), (2048 + 100, 7 * BATCH + 1, False)],
)
def test_the_dead_horizon_counts_what_the_last_step_has_seen(about, n_tokens, window, fires):
    words = [f"trainer.n_tokens={n_tokens}", f"trainer.dead_window={window}"]
    found = about(10_000, *words)
    assert (
        found == []
        if fires
        else found
        == [
            f"dead horizon {window:,} tokens > {7 * BATCH:,} training tokens before the last step: "
            "AuxK will never fire (trainer.dead_window)"
        ]
    )
    assert about(10_000, *words, "sae/dead_latents=none") == []
    assert about(10_000, *[w for w in words if "dead" not in w], "sae=relu") == []


def test_epochs_and_bounds(about):
    assert about(1000) == [
        "store has fewer rows than trainer.n_tokens: 2.0 epochs of 1,000 rows, reshuffled"
    ]
    assert about(1000, at_most=True) == [
        "store has fewer rows than trainer.n_tokens: at least 2.0 epochs of at most 1,000 rows, "
        "reshuffled"
    ]


def test_limits_that_limit_nothing_are_named():
    dataset = Digits(heldout=0.2, n_examples=5000, n_heldout=10, seed=0)
    assert limit_warnings(dataset) == ["dataset.n_examples=5000: there are 1,438, the same as null"]
    assert limit_warnings(Digits(heldout=0.2, n_examples=10, n_heldout=None, seed=0)) == []


def test_dropped_rows_are_named(about):
    assert about(5000, n_dropped=1234) == ["1,234 training rows dropped as norm outliers"]


def test_training_says_the_same(in_process, small, tmp_path, capsys):
    words = [*small, "trainer.n_tokens=4096", "trainer.dead_window=5000", "evaluators=[]"]
    assert in_process("plan", *words) == 0
    planned = [line[2:] for line in capsys.readouterr().out.splitlines() if line[0] == "!"]
    assert in_process("train", *words) == 0
    err = capsys.readouterr().err
    assert len(planned) == 2 and all(f"WARNING {line}\n" in err for line in planned)
