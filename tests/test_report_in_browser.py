"""The report in headless Chromium, at the widths of a desk and of a telephone: skipped where there is no Chromium."""

import os
import re
import shutil
import subprocess

import pytest
from audit_world import write_audit
from report_world import write_training

from llm_unlearn.report.page import make_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("Chromium is not installed: no page is opened", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page is opened")

HEADINGS = {
    "Verdict",
    "At a glance",
    "What attacks bring back",
    "Forgetting against keeping",
    "Who was in the forget set",
    "What the layers know",
    "What the models write",
    "Training",
    "All metrics",
    "Membership inference",
    "Cost",
    "What the numbers mean",
    "Where the runs come from",
}
WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A function that returns the file of a page of audits: "one", "several" (three), "many" (six, with long names)."""
    folder, files = tmp_path_factory.mktemp("browser"), {}
    runs = folder / "runs"

    def file_of(name):
        if name not in files:
            sizes = {"one": 1, "several": 3, "many": 6}
            audits = [("npo", 0.9, "not_gone"), ("rmu", 0.45, "gone"), ("undial", 0.7, "unclear")]
            audits += [(f"rewritten_transfer_of_{layer}", 0.8, "not_gone") for layer in ("early", "middle", "late")]
            for method, recovers, status in audits[: sizes[name]]:
                settings = {"lens_path": f"{method}/a_folder_with_a_long_name/lens"}
                write_training(runs / method, method, **settings)
                write_audit(runs / method / "audit", method, recovers=recovers, status=status)
            files[name] = folder / f"{name}.html"
            found = [runs / method for method, *_ in audits[: sizes[name]]]
            files[name].write_text(make_page(found, f"{name} audited")[0], encoding="utf-8")
        return files[name]

    return file_of


@pytest.fixture(scope="module")
def browser():
    # Ubuntu's package is a script that only says where else to get it.
    if subprocess.run([CHROMIUM, "--version"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{CHROMIUM} does not start: no page is opened")
    # Chromium refuses to run as root with its sandbox.
    args = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, pages):
    """A function that opens a page and returns it with what it said and asked for."""
    contexts = []

    def open_page(name, width, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages(name).as_uri())
        return page, said, [url for url in asked if not url.startswith(("data:", pages(name).as_uri()))]

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", *(pytest.param(n, marks=pytest.mark.full) for n in ("several", "many"))])
def test_the_page_is_whole(opened, tmp_path, name, width):
    page, said, asked = opened(name, width)
    page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
    assert (tmp_path / f"{name}-{width}.png").stat().st_size > 50_000
    assert said == [] and asked == [], "no error on the console, no request but for the page itself"
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "the page scrolls sideways"
    headings = page.locator("h2").all()
    assert all(heading.is_visible() for heading in headings)
    assert {heading.text_content().strip() for heading in headings} >= HEADINGS
    boxes = [plot.bounding_box() for plot in page.locator("svg.plot:visible").all()]
    assert len(boxes) >= 12 and all(box["width"] > 200 and box["height"] > 150 for box in boxes)
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)


@pytest.mark.full
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_stays_whole_with_everything_unfolded(opened, tmp_path, width):
    page, _, _ = opened("several", width)
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    page.screenshot(path=tmp_path / f"unfolded-{width}.png", full_page=True)
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "the page scrolls sideways"
    for table in page.locator("details.numbers table").all():
        assert table.is_visible()


def test_what_is_read_on_a_telephone_is_no_smaller(opened):
    """Plots are drawn for the width that they are shown at: their letters are never scaled below 10 pixels."""
    page, _, _ = opened("one", 400)
    sizes = page.evaluate(
        "[...document.querySelectorAll('svg.plot text')].map(text => text.getBoundingClientRect().height)"
        ".filter(height => height > 0)"
    )
    assert len(sizes) > 50 and min(sizes) >= 10


@pytest.mark.parametrize("name", ["one", pytest.param("several", marks=pytest.mark.full)])
def test_lines_differ_without_color(opened, tmp_path, name):
    """In greyscale, what tells the lines of a plot apart are dashes and markers."""
    page, _, _ = opened(name, 1280)
    page.evaluate("document.documentElement.style.filter = 'grayscale(1)'")
    page.screenshot(path=tmp_path / f"{name}-grey.png")
    plots = page.evaluate(
        """[...document.querySelectorAll('.pair .wide svg.plot')].map(plot =>
          [...plot.querySelectorAll("g[id*='-line-'], g[id*='-level-']")].map(line =>
            getComputedStyle(line.querySelector('path')).strokeDasharray))"""
    )
    compared = [dashes for dashes in plots if len(dashes) > 1]
    assert compared and all(len(set(dashes)) == len(dashes) for dashes in compared)


@pytest.mark.full
def test_dark_and_light_differ(opened, tmp_path):
    colors = {}
    for scheme in ("light", "dark"):
        page, _, _ = opened("one", 1280, scheme)
        page.screenshot(path=tmp_path / f"{scheme}.png")
        read = "getComputedStyle(document.querySelector(\"g[id$='-line-1'] path\")).stroke"
        colors[scheme] = [page.evaluate("getComputedStyle(document.body).backgroundColor"), page.evaluate(read)]
    assert all(a != b and re.match(r"rgb", a) for a, b in zip(*colors.values(), strict=True))


def test_the_keyboard_shows_where_it_is(opened):
    page, _, _ = opened("one", 1280)
    seen = set()
    for _ in range(24):
        page.keyboard.press("Tab")
        tag, style, width = page.evaluate(
            "(() => { const at = document.activeElement, style = getComputedStyle(at);"
            " return [at.tagName, style.outlineStyle, style.outlineWidth]; })()"
        )
        seen.add(tag)
        assert style == "solid" and width == "2px", f"<{tag}> shows no focus"
    assert {"A", "DIV"} <= seen


def test_hostile_generations_stay_text(opened):
    page, said, _ = opened("one", 1280)
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert page.locator(".text", has_text="<script>alert('generated')</script>").count() >= 2 and said == []
