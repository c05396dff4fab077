"""A headless Chromium draws every panel of a report without scripts, in light and dark mode. The keyboard reaches it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_dist.monitor.report.page import render
from moe_dist.monitor.report.panels import PANELS
from moe_dist.monitor.report.routing import Layout, Routing, Subject
from tests.support.browser import Browser, browser
from tests.unit.monitor.conftest import draw_groups
from tests.unit.monitor.report.conftest import draw_routing
from tests.unit.tools.test_report_attached import trained
from tools.report import open_routing

LARGE = draw_groups(1, num_experts=256, num_null=0, top_k=8)


def collapse(preference_LC: np.ndarray, group: int) -> None:
    preference_LC[2, 4] += 50 * group


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the run folder of a Hugging Face model that a loop outside of moe_dist trained. Without a tokenizer, tokens
    have ids but no names."""
    return trained(tmp_path_factory.mktemp("attached"), collapsed=1)


def foreign(folder: Path) -> Path:
    """Writes arrays in the form in which vLLM and SGLang return them."""
    rng = np.random.default_rng(0)
    np.save(folder / "answer.npy", rng.permuted(np.tile(np.arange(16), (400, 2, 1)), axis=2)[..., :4].astype(np.int16))
    return folder


def write(folder: Path, routing: Routing, against: Routing | None = None) -> Path:
    path = folder / "report.html"
    path.write_text(render(Subject(routing, against, [Layout("as in the run", routing.placement)], (2, 4))))
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("case", ["healthy", "sick", "large", "without tokens", "attached", "foreign"])
def test_every_panel_is_drawn(page: Browser, tmp_path: Path, attached: Path, case: str, dark: bool) -> None:
    routing = {
        "healthy": lambda: draw_routing(steps=20),
        "sick": lambda: draw_routing(bias=collapse),
        "large": lambda: draw_routing(LARGE, layers=48, ranks=64, tokens=300),
        "without tokens": lambda: replace(draw_routing(), tokens=None),
        "attached": lambda: open_routing(attached),
        "foreign": lambda: open_routing(foreign(tmp_path), experts=16),
    }[case]()
    page.errors.clear()
    page.requests.clear()
    path = write(tmp_path, routing, draw_routing(seed=1) if case == "healthy" else None)
    page.open(path, dark=dark, script=False)
    assert page.errors == []
    assert page.requests == [path.as_uri()]
    assert path.stat().st_size < 2_000_000
    sizes = page.value("[...document.querySelectorAll('section')].map(s => [s.innerText.length, s.offsetHeight])")
    assert len(sizes) == len(PANELS)
    assert all(letters > 40 and height > 60 for letters, height in sizes), sizes
    broken = page.value("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert broken == 0
    # An SVG that was not drawn shows only the page's colour.
    boxes = page.value(
        "[...document.querySelectorAll('figure > svg')].filter(s => s.checkVisibility())"
        ".map(s => s.getBoundingClientRect()).map(b => [b.x + scrollX, b.y + scrollY, b.width, b.height])"
    )
    image = np.asarray(Image.open(page.picture(tmp_path / "page.png")).convert("RGB"))
    assert len(boxes) >= {"without tokens": 5, "foreign": 6, "attached": 10}.get(case, 12)
    for x, y, width, height in (np.array(box).astype(int) for box in boxes):
        assert len(np.unique(image[y : y + height, x : x + width].reshape(-1, 3), axis=0)) > 3, (x, y, width, height)
    assert (image[3, 3].max() < 60) == dark
    cells = page.value(
        "[...document.querySelectorAll('svg image')].filter(s => s.checkVisibility()).map(s => s.getBoundingClientRect())"
        ".flatMap(b => [[b.left, b.top], [b.right - 3, b.bottom - 3]]).map(([x, y]) => [x + scrollX + 1, y + scrollY + 1])"
    )
    if dark:  # the corners of a heat map have colours of cells; on a light page a cell may have the page's colour
        assert all((image[int(y), int(x)] != image[3, 3]).any() for x, y in cells)
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    first = page.value("document.querySelector('main').innerText.split('\\n')[0]")
    assert first.startswith("Look at routing" if case in ("sick", "attached") else "No rule finds a fault"), first


@pytest.mark.parametrize("width", [400, 1200])
def test_the_head_is_readable_at_the_width_of_a_phone(page: Browser, tmp_path: Path, width: int) -> None:
    page.open(write(tmp_path, draw_routing(bias=collapse)), width=width, script=False)
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    sizes = page.value("[...document.querySelectorAll('.heads li, svg')].map(e => e.scrollWidth / e.clientWidth)")
    assert max(size or 1 for size in sizes[:5]) <= 1, "no line of the head is cut"
    scales = page.value(
        "[...document.querySelectorAll('figure > svg')].filter(s => s.checkVisibility())"
        ".map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width * parseFloat(getComputedStyle(s).fontSize))"
    )
    assert min(scales) >= 10, "labels have at least 10 pixels"


def test_the_keyboard_moves_the_slider_and_opens_details(page: Browser, tmp_path: Path) -> None:
    page.open(write(tmp_path, draw_routing(steps=5)), script=False)
    shown = "document.querySelector('.slider input:checked').ariaLabel"
    visible = "[...document.querySelectorAll('.frames > div')].map(f => f.checkVisibility())"
    assert page.value(shown) == "Steps 5"
    reached = set()
    for _ in range(200):
        page.press("Tab")
        reached.add(page.value("document.activeElement.tagName"))
        if page.value("document.activeElement.type") == "radio":
            page.press("ArrowLeft")
            assert page.value(shown) == "Steps 4"
            assert page.value(visible) == [False, False, False, True, False]
            page.press("ArrowRight")
        closed = "document.activeElement.tagName === 'SUMMARY' && !document.activeElement.parentElement.open"
        if page.value(closed):
            page.press("Enter")
            assert page.value("document.activeElement.parentElement.open")
        if page.value("document.activeElement === document.body"):  # the focus has left the last element
            break
    assert {"A", "INPUT", "SUMMARY", "DIV"} <= reached
    assert page.value("[...document.querySelectorAll('details')].every(d => d.open)")
