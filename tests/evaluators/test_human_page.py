"""The page of a rating pack in a real browser: keys, what is kept, what is handed back."""

import json
import shutil

import pytest
from rating_fixtures import data_of, measured

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    """A page that fails the test where a script fails or anything is fetched."""
    context = browser.new_context(accept_downloads=True)
    found, wrong = context.new_page(), []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda said: wrong.append(said.text))
    found.on("request", lambda r: r.url.startswith("http") and wrong.append(r.url))
    yield found
    context.close()
    assert wrong == []


def opened(page, findings, path):
    (path / "pack.html").write_text(findings.texts["pack.html"])
    page.goto((path / "pack.html").as_uri())
    return data_of(findings)


def rate(page, keys):
    for key in keys:
        page.keyboard.press(key)


def test_a_rater_works_by_keyboard_and_what_is_saved_is_ingested(page, tmp_path):
    data = opened(page, measured(), tmp_path)
    assert page.inner_text("h1") == f"Rating pack {data['pack']}"
    page.click('[data-rater="2"]')
    turns = data["raters"]["2"]["turns"]
    assert page.inner_text("h1") == f"Item 1 of {len(turns)}"
    item = next(i for i in data["items"] if i["item"] == turns[0][0])
    pieces = "".join(item["intervals"][0]["examples"][0]["pieces"])
    assert page.inner_text(".text >> nth=0") == pieces
    assert page.locator(".interval > span").count() == 0  # This rater sees no strengths.
    rate(page, ["2", "9", "5", "1", "ArrowUp", "ArrowUp", "3", "1"])
    # A score too high does nothing; 2, 5, 1, then from the third row up twice: 3 and 1.
    pressed = page.locator('[aria-pressed="true"]').all_inner_texts()
    assert pressed == ["2", "3", "1"]
    page.keyboard.press("t")
    page.keyboard.type("words about 12 cats")
    page.keyboard.press("Escape")
    rate(page, ["ArrowDown"] * 4 + ["1"])
    assert page.inner_text("#count") == f"1 of {len(turns)} rated"
    page.keyboard.press("Enter")
    assert page.inner_text("h1") == f"Item 2 of {len(turns)}"
    page.reload()
    assert page.inner_text("h1") == f"Item 2 of {len(turns)}"  # Rater and place are kept.
    assert page.inner_text("#count") == f"1 of {len(turns)} rated"
    page.keyboard.press("ArrowLeft")
    assert page.input_value(".form textarea") == "words about 12 cats"
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == f"responses-{data['pack']}-2.jsonl"
    download.value.save_as(tmp_path / "back.jsonl")
    (response,) = map(json.loads, (tmp_path / "back.jsonl").read_text().splitlines())
    assert (response["rater"], response["item"], response["repeat"]) == ("2", *turns[0])
    assert response["interpretation"] == "words about 12 cats"
    assert response["logit_consistency"] is None and 0 <= response["seconds"] < 100
    page.click("summary")
    page.wait_for_function("document.getElementById('by-hand').value.length > 10")
    assert json.loads(page.input_value("#by-hand"))["item"] == turns[0][0]
    found = measured(responses=str(tmp_path / "back.jsonl"))
    assert found.metrics["human"]["n_responses"] == 1
    total = next(v for v in found.tables["items"]["total"] if v is not None)
    names = ("confidence", "activation_consistency", "specificity")
    assert total == sum(response[name] for name in names)


def test_pictures_are_shown_with_what_is_active_and_every_item_can_be_rated(page, tmp_path):
    data = opened(page, measured(image=True, n_latents=3, n_neurons=1), tmp_path)
    page.click('[data-rater="1"]')
    turns = data["raters"]["1"]["turns"]
    assert page.locator(".interval > span >> nth=0").inner_text().endswith("100%")
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth === 8)")
    assert page.locator("canvas").count() == page.locator("img").count() > 0
    page.keyboard.press("h")
    assert not page.locator("canvas >> nth=0").is_visible()
    for _ in turns:
        rate(page, ["3", "4", "2", "1", "Enter"])
    assert page.inner_text("h1") == "All items shown"
    assert page.inner_text("#count") == f"{len(turns)} of {len(turns)} rated"
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "back.jsonl")
    found = measured(image=True, n_latents=3, n_neurons=1, responses=str(tmp_path / "back.jsonl"))
    metrics = found.metrics["human"]
    assert metrics["n_responses"] == len(turns) and metrics["total_median"] == 9
    assert metrics["repeat_exact"] == 1 and metrics["interpretable_frac"] == 1


def test_text_of_the_data_is_text_and_no_markup(page, tmp_path, monkeypatch):
    from rating_fixtures import Reader

    evil = "</script><img src=x onerror=alert(1)>"
    monkeypatch.setattr(Reader, "pieces", lambda self, tokens: [evil for _ in tokens])
    opened(page, measured(), tmp_path)
    page.click('[data-rater="1"]')
    assert evil in page.inner_text(".text >> nth=0") and page.locator("img").count() == 0
