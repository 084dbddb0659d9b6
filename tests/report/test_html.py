import base64
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sae_runner.report.comparison import compare
from sae_runner.report.figures import draw_run
from sae_runner.report.html import page
from sae_runner.report.runs import load_runs

MakeRun = Callable[..., Path]
X, Y = "sparsity.l0", "reconstruction.fvu"
VOID = {"meta", "img", "br", "link", "input"}
EVIL = "<script>alert('x')</script><img src=http://example.org/x onerror=alert(1)>\"'&"


class Outline(HTMLParser):
    """Elements, ids and text of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


def render(folders: list[Path], left_out: list[str] | None = None, **kwargs: Any) -> str:
    runs, damaged = load_runs(folders)
    assert damaged == []
    metrics = [X, Y, "reconstruction.cosine", "density.dead_frac"]
    return page(compare(runs, metrics, X, Y), left_out or [], None, {}, **kwargs)


def test_the_page_is_well_formed_and_has_its_sections(make_run: MakeRun) -> None:
    expected = [{"metric": Y, "value": 0.11, "low": 0.1, "high": 0.12, "source": "Study"}]
    note = {"code": "zero_denominator", "metric": "reconstruction.cosine", "detail": "no rows"}
    folders = [
        make_run("a", config={"sae.k": 16, "device": "cuda", "expected": expected}),
        make_run("b", metrics={"reconstruction.cosine": None}, notes=[note],
                 report={"warnings": ["MODEL WEIGHTS ARE RANDOM"]}),
    ]  # fmt: skip
    outline = Outline(render(folders, ["left out, damaged: c"]))
    ids = outline.values("id")
    assert ids == [
        "summary", "read-before-comparing", "published-against-measured", "config", "runs",
        "run-1", "run-2",
    ]  # fmt: skip
    links = [value for tag, key, value in outline.attributes if (tag, key) == ("a", "href")]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    for said in (
        "left out, damaged: c", "MODEL WEIGHTS ARE RANDOM", "not reproduced", "[0.1, 0.12]",
        "reconstruction: reconstruction.cosine: zero_denominator: no rows", "0123456789abcdef",
        "Different, but without effect on results", "2.15.0", "a" * 64, "sae=topk",
    ):  # fmt: skip
        assert said in outline.text, said


def test_one_reason_for_many_metrics_is_one_line(make_run: MakeRun) -> None:
    notes = [
        {"code": "not_applicable", "metric": f"density.m{i}", "detail": "nobody answered"}
        for i in range(4)
    ]
    notes.append({"code": "dead_feature", "metric": "density.m0", "detail": "nobody answered"})
    text = Outline(render([make_run("a", notes=notes)])).text
    assert "density: density.m0 and 3 more: not_applicable: nobody answered" in text
    assert "density: density.m0: dead_feature: nobody answered" in text
    assert text.count("nobody answered") == 2


def test_no_name_in_a_report_becomes_markup(make_run: MakeRun) -> None:
    note = {"code": EVIL, "metric": "density.x", "detail": EVIL}
    expected = [{"metric": EVIL, "low": 0, "unit": EVIL, "source": EVIL}]
    evil = make_run(
        "a<b>&'\"", config={f"sae.{EVIL[:8]}": EVIL, "expected": expected}, notes=[note],
        report={"warnings": [EVIL], "overrides": [EVIL], "versions": {EVIL: EVIL}},
    )  # fmt: skip
    plain = make_run("b")
    outline = Outline(render([evil, plain], [EVIL]))
    quiet = Outline(render([make_run("c"), plain]))
    assert outline.tags["script"] == quiet.tags["script"] == 1
    assert outline.tags["img"] == 0
    assert not [key for _, key, _ in outline.attributes if key.startswith("on")]
    assert outline.text.count(EVIL) >= 8


def test_nothing_is_fetched(make_run: MakeRun) -> None:
    text = render([make_run("a"), make_run("b")])
    outline = Outline(text)
    assert outline.tags["link"] == 0
    assert outline.values("src") == []
    assert not re.search(r"https?://|@import|url\(", text)
    policy = [value for tag, key, value in outline.attributes if (tag, key) == ("meta", "content")]
    assert policy[0].startswith("default-src 'none'; img-src data:;")


def test_cells_sort_by_their_full_value_and_null_has_none(make_run: MakeRun) -> None:
    note = {"code": "zero_denominator", "metric": "reconstruction.cosine", "detail": "no rows"}
    a = make_run("a", metrics={Y: 0.123456789, "reconstruction.cosine": None}, notes=[note])
    text = render([a])
    summary = text[text.index('id="summary"') : text.index('id="config"')]
    values = re.findall(r'<td[^>]*data-value="([^"]*)"', summary)
    assert values == ["1", "a", "31.4", "0.123456789", "", "0.25"]


def test_figures_are_inside(make_run: MakeRun) -> None:
    runs, _ = load_runs([make_run()])
    svgs = [path for path in draw_run(runs[0].path) if path.suffix == ".svg"]
    text = page(compare(runs, [X], X, Y), [], svgs[1], {0: svgs})
    sources = Outline(text).values("src")
    assert len(sources) == 5
    decoded = [base64.b64decode(source.partition(",")[2]) for source in sources]
    assert decoded == [path.read_bytes() for path in (svgs[1], *svgs)]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)


@pytest.mark.parametrize("n", [1, 3])
def test_the_title_counts_the_runs(make_run: MakeRun, n: int) -> None:
    text = render([make_run(f"r{i}") for i in range(n)])
    assert f"<title>{n} SAE run{'s' * (n > 1)} compared</title>" in text
