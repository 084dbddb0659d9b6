"""What was typed, before Hydra reads it."""

import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sae_runner.command_line import leave_to_jobs, put_flags_first, quoted
from sae_runner.composition import composed_jobs


def read(word):
    """The value, or the values of a sweep, as Hydra understands an override."""
    (override,) = OverridesParser.create().parse_overrides([word])
    if override.is_sweep_override():
        return [str(item).strip("'") for item in override.sweep_string_iterator()]
    return override.value()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("dataset.path=/tmp/Bücher/x.tsv", "/tmp/Bücher/x.tsv"),
        ("dataset.path=/tmp/my Bücher/x.tsv", "/tmp/my Bücher/x.tsv"),
        ("dataset.path=a#b&c;d!e~f<g>h^i`j", "a#b&c;d!e~f<g>h^i`j"),
        ("dataset.path=~/x.tsv", "~/x.tsv"),
        ("dataset.path=東京/*.parquet", "東京/*.parquet"),
        ("dataset.path='/tmp/Bücher'", "/tmp/Bücher"),
        ('dataset.path="/tmp/it\'s Bücher"', "/tmp/it's Bücher"),
        ("site.name=[embed, é.b, 'ü c']", ["embed", "é.b", "ü c"]),
        ("model.x={a: ü, b: 3}", {"a": "ü", "b": 3}),
        ("dataset.path=/a/ü,/b/plain,'/c/ö'", ["/a/ü", "/b/plain", "/c/ö"]),
        ("+x=${outputs}/Bücher", "${outputs}/Bücher"),
    ],
)
def test_a_value_may_have_any_character(word, value):
    assert read(quoted(word)) == value


@pytest.mark.parametrize(
    "word",
    ["sae.k=8", "sae=topk,relu", "sae.k=range(1,8,2)", "site.name='blocks.*.resid_post'", "x=1e-3",
     "dataset.path=/tmp/x.tsv", "site.name=[a,b]", "x={a:1}", "outputs=${oc.env:HOME}/x", "--help",
     "~ümodel", "a=b:c d", "x=glob(*,exclude=b*)"],
)  # fmt: skip
def test_what_hydra_reads_is_left_as_it_is(word):
    assert quoted(word) == word


def test_keys_that_only_the_options_of_a_sweep_have_are_the_jobs(monkeypatch):
    words = ["-m", "model=toy", "sae=jump_relu,gated", "sae/dead_latents=none,resample",
             "+sae.dead_latents.n_rows=64", "sae.target_l0=4", "+sae.bandwidth='0.5'", "seed=1,2",
             "trainer.lr=0.1", "sae.expansion=2,4", "site.name=[a,b]"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sae-run", *words])
    leave_to_jobs()
    assert sys.argv[1:] == [
        *words[:4], "+sae.dead_latents.n_rows=choice(64)", "sae.target_l0=choice(4)",
        "+sae.bandwidth=choice('0.5')", *words[7:],
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sae-run", *words[1:]])
    leave_to_jobs()
    assert sys.argv[1:] == words[1:]


def test_a_sweep_over_kinds_sets_what_the_default_kind_lacks(monkeypatch):
    words = ["-m", "model=toy", "sae=jump_relu,jump_relu_quadratic", "sae.bandwidth=0.5"]
    monkeypatch.setattr(sys, "argv", ["sae-run", *words])
    leave_to_jobs()
    jobs = composed_jobs("train", sys.argv[1:])
    assert [job.cfg["sae"]["bandwidth"] for job in jobs] == [0.5, 0.5]
    assert jobs[0].overrides == ["model=toy", "sae=jump_relu", "sae.bandwidth=0.5"]


def test_flags_and_their_values_may_stand_between_overrides(monkeypatch):
    typed = ["sae-run", "sae.k=8", "--cfg", "job", "seed=1,2", "-m", "outputs=x"]
    monkeypatch.setattr(sys, "argv", typed)
    put_flags_first()
    assert sys.argv == ["sae-run", "--cfg", "job", "-m", "sae.k=8", "seed=1,2", "outputs=x"]


def test_a_flag_without_its_value_stays_last(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sae-run", "sae.k=8", "-m", "--cfg"])
    put_flags_first()
    assert sys.argv == ["sae-run", "-m", "sae.k=8", "--cfg"]
