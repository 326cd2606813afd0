"""The explorer in a browser, from the disk: every part is used, nothing is asked of a network."""

import base64
import json

import numpy as np
import pytest
import torch
from browser import browser as started
from PIL import Image
from viewer import explored
from viewer.made import made, picture
from viewer.test_explorer_page import FIXTURES

from captum_dcam import Comparison
from captum_dcam.viewer.explorer import explorer_page
from captum_dcam.viewer.explorer_index import Case, index_page

CHOSEN = "document.querySelector('#answer [aria-pressed=true]')"
PIXELS = "document.getElementById('picture').toDataURL()"
BLANKS = "document.querySelectorAll('#answer .chip.blank').length"
TEXTS = "[...document.querySelectorAll('{}')].map(e => e.textContent)"


@pytest.fixture(scope="module")
def chromium():
    with started() as one:
        yield one


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens a page; at the end it must have made no error and no request."""

    def show(page, **how):
        file = tmp_path / "page.html"
        file.write_text(page)
        chromium.page(file, **how)
        return chromium

    yield show
    assert chromium.faults() == []


def test_words_steps_keys_and_the_picture(opened):
    e = explored.stepped()
    b = opened(explorer_page(e))
    pixels = b.js(PIXELS)
    last = len(e.words) - 1
    b.click("#answer .chip", number=last)
    assert b.js("state.word") == last and b.js(PIXELS) != pixels  # a click on a word
    assert b.js(f"{CHOSEN}.textContent") == (e.words[last].strip() or "␣")
    assert f"word={last + 1}" in b.js("location.hash")
    b.hover("#answer .chip")
    assert b.js("state.word") == last  # hovering selects nothing
    b.key("ArrowLeft")
    assert b.js("state.word") == last - 1
    b.js("document.getElementById('step').value = 0")
    b.js("document.getElementById('step').dispatchEvent(new Event('input'))")
    now = sum(max(steps) > 0 for steps in e.commit_steps())
    assert b.js(BLANKS) == now  # the slider: what is not written yet is blank
    b.key("ArrowRight", shift=True)
    assert b.js("state.step") == 1 and b.js(BLANKS) < now + 1
    b.click("#lane", at=(0.98, 0.5))
    assert b.js("state.step") == e.trajectory.steps - 1 and b.js(BLANKS) == 0
    b.click("#play")
    b.until("state.playing && state.step > 0")
    b.click("#play")
    assert b.js("state.playing") is None
    shown = b.js(PIXELS)
    b.click("#heat")
    assert b.js(PIXELS) != shown  # without heat
    b.click("#heat")
    b.click("#smooth")
    assert b.js(PIXELS) != shown  # the tokens' boxes
    b.click("#smooth")
    assert b.js(PIXELS) == shown
    assert b.js("document.querySelectorAll('#pair canvas').length") == 2
    assert b.js("document.querySelectorAll('#relevance .tokens span').length") > 0
    b.click("#word summary")
    b.key("ArrowLeft")
    assert b.js("document.querySelector('#word details').open") is True  # of every word, then
    assert "entropy when committed, nats" in b.js("document.querySelector('#word').textContent")


def test_a_point_and_a_region_of_the_picture(opened):
    e = explored.stepped()
    b = opened(explorer_page(e))
    b.click("#picture", at=(0.3, 0.4))
    assert b.js("state.region.token") is True
    b.click("#picture", at=(0.02, 0.02), to=(0.9, 0.9))
    shares = b.js("looking({image: 0, x0: 0, x1: 0.5, y0: 0, y1: 1})")
    maps, half = e.maps[0].double(), e.maps[0].shape[2] // 2
    grid = e.layout.grids[0]
    assert grid.whole and e.maps[0].shape[2] % 2 == 0
    total = maps.sum((1, 2)).clamp(min=1e-30)
    assert shares == pytest.approx((maps[:, :, :half].sum((1, 2)) / total).tolist(), abs=0.01)
    rows = b.js(TEXTS.format("#looking .bar span:last-child"))
    dragged = sorted((round(100 * s) for s in b.js("looking(state.region)")), reverse=True)
    assert b.js("state.region.token") is None and [f"{p}%" for p in dragged][: len(rows)] == rows
    opacity = b.js("[...document.querySelectorAll('#answer .chip')].map(c => +c.style.opacity)")
    assert len(set(opacity)) > 1  # words are tinted by their share
    b.key("Escape")
    assert b.js("state.region") is None and b.js("document.querySelector('#looking .bar')") is None


@pytest.mark.parametrize("smooth", (True, False))
@pytest.mark.parametrize("make", (explored.stepped, explored.tiled), ids=("one grid", "tiles"))
def test_maps_are_where_the_layout_has_them(opened, make, smooth):
    e = make()
    b = opened(explorer_page(e))
    wide, high = 37, 29
    found = b.js(f"Array.from(overImage(chosenMaps()(1), 0, {wide}, {high}, {json.dumps(smooth)}))")
    top = max(float(m[1].max()) for m in e.maps)
    own = [(m[1] / top * 255).round() for m in e.maps]
    mode = "bilinear" if smooth else "nearest"
    expected = e.layout.over_image(own, 0, (high, wide), mode)
    assert np.abs(np.array(found) - expected.flatten().numpy()).max() < 0.01 + 0.51 * len(own)


def test_methods_scores_code_and_what_is_taken_away(opened, tmp_path):
    c = Comparison.load(FIXTURES / "comparison")
    b = opened(explorer_page(c))
    assert b.js("document.getElementById('steps').hidden") is True
    assert "reads every word once" in b.js("document.getElementById('no-steps').textContent")
    cards = b.js("document.querySelectorAll('.method').length")
    assert cards == len(c.rows)
    pixels, other = b.js(PIXELS), next(n for n in range(1, cards) if any(c.rows[n].complete))
    b.click(".method", number=other)
    assert b.js("state.method") == other and b.js(PIXELS) != pixels  # the method switch
    assert b.js("document.getElementById('method').selectedOptions[0].textContent") == (
        c.rows[other].label
    )
    b.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    b.click("#png")
    b.click("#csv")
    b.until("true")
    found = {}
    while len(found) < 2:
        b.until("true")
        found = {p.suffix: p for p in tmp_path.iterdir() if p.suffix in (".png", ".csv")}
    lines = found[".csv"].read_text().splitlines()
    h, w = c.rows[other].maps[0].shape[1:]
    assert len(lines) == 1 + h * w and lines[0].startswith("word,method,image")
    values = torch.tensor([float(line.split(",")[-1]) for line in lines[1:]]).view(h, w)
    own = c.rows[other].maps[0][0]
    assert torch.allclose(values, own / own.max(), atol=0.003)
    Image.open(found[".png"]).load()
    b.click("#code summary")
    assert "captum_dcam.compare(" in b.js("document.querySelector('#code pre').textContent")


def test_a_video_has_a_strip(opened):
    b = opened(explorer_page(explored.filmed()))
    assert b.js(TEXTS.format("#strip button").replace("textContent", "ariaLabel")) == [
        "image 1",
        "image 3",
        "image 4",
    ]
    pixels = b.js(PIXELS)
    b.click("#strip button", number=2)
    assert b.js("state.image") == 2 and b.js(PIXELS) != pixels
    assert "image=3" in b.js("location.hash")


def test_a_link_keeps_word_and_step_and_texts_are_texts(opened):
    page = explorer_page(made(4, images=1, text="</script><img src=x onerror=alert(1)>"))
    b = opened(page, hash="#word=3&step=2&method=9&word=x")
    assert (b.js("state.word"), b.js("state.step")) == (2, 2)
    assert b.js("document.querySelectorAll('img').length") == 0
    b.js("location.hash = '#word=1&step=3'")
    b.until("state.word === 0 && state.step === 3")
    opened(explorer_page(made(0)))  # nothing was explained


@pytest.mark.parametrize("size", ((390, 800), (1100, 850)))
def test_phones_and_dark_mode(opened, size):
    e = explored.stepped()
    b = opened(explorer_page(e), size=size, dark=True)
    assert b.js("document.documentElement.scrollWidth") <= size[0]
    dark = b.js("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, dark[4:-1].split(","))) < 60
    names = "[...document.querySelectorAll('button, input, select, canvas[role], svg[role]')]"
    unnamed = b.js(
        f"{names}.filter(e => !(e.ariaLabel || e.textContent || e.closest('label') || e.title)"
        " && e.offsetParent).map(e => e.outerHTML.slice(0, 80))"
    )
    assert unnamed == []


def test_an_index_over_cases(opened):
    cases = [
        Case(
            f"image {n}",
            image=picture((60, 40), n),
            answer=f"a word{n}",
            words=({"text": f"word{n}", "commit": n, "probability": 0.5},),
            scores={"ours": {"f3": [value]}, "random": {"f3": [0.1 + n], "iou": [None]}},
            masks={"thing": torch.ones(40, 60, dtype=torch.bool)},
            command=f"captum-dcam explain --scene {n}",
        )
        for n, value in enumerate((0.5, None, 0.1, 0.9))
    ] + [Case("image 4", error="ValueError: <b>damaged</b>")]
    b = opened(index_page("made", cases, how="how", first="f3"))
    order = lambda: [t.split("a word")[-1] for t in b.js(TEXTS.format(".case"))][:4]  # noqa: E731
    assert order() == ["2", "0", "3", "1"]  # the worst first, those without a score last
    b.click(".case")
    assert b.js("state.open") == 2 and "--scene 2" in b.js(
        "document.getElementById('detail').textContent"
    )
    b.key("ArrowRight")
    assert b.js("state.open") == 0 and b.js("location.hash") == "#case=1"
    b.js("document.getElementById('order').value = 'down'")
    b.js("document.getElementById('order').dispatchEvent(new Event('change'))")
    assert order()[:3] == ["3", "0", "2"]
    b.js("document.getElementById('find').value = 'WORD3'")
    b.js("document.getElementById('find').dispatchEvent(new Event('input'))")
    assert len(b.js(TEXTS.format(".case"))) == 1
    b.key("Escape")
    assert b.js("document.getElementById('detail').hidden") is True


def test_a_notebooks_frame_works(opened):
    """In a frame without rights: it draws, and asks for nothing that a frame may not do."""
    frame = made(3)._repr_html_()
    b = opened(
        f"<body>{frame}<script>onload = () => (document.body.dataset.ready = 'yes')</script>"
    )
    shot = base64.b64decode(b.send("Page.captureScreenshot")["data"])
    assert len(shot) > 5000
