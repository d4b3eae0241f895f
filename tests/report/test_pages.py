"""The site in a real headless Chromium: no console error, nothing fetched, no overflow at 360 px, axe-core
clean in light and dark, usable by keyboard."""

import os
import re
from pathlib import Path

import pytest
from browser import chromium
from conftest import ROOT
from test_report import make

from kn import report
from kn.report import pages

PAGES = ["index", "claims", "how", "failed", "records", "table3", "table5", "beyond_alignment",
         "beyond_compression"]


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def site():
    """The committed report: what readers get is what is tested. KN_REPORTS names another."""
    return Path(os.environ.get("KN_REPORTS") or ROOT / "reports" / "published")


def opened(browser, path, width=1200, scheme="light"):
    """(page, its console's complaints, what it asked for beside itself)."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, complaints, asked = context.new_page(), [], []
    page.on("console",
            lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    return page, complaints, [url for url in asked if url != path.as_uri()]


@pytest.mark.parametrize("name", ["../index", *PAGES])
def test_quiet_self_contained_and_narrow(browser, site, name):
    page, complaints, asked = opened(browser, (site / "mini" / f"{name}.html").resolve(), width=360)
    assert not complaints and not asked
    wide = page.evaluate("document.documentElement.scrollWidth")
    outside = ("[...document.querySelectorAll('body *')]"
               ".filter(e => e.getBoundingClientRect().right > 361"
               " && !e.closest('.scroll, nav, figure, pre'))")
    assert wide <= 360, page.evaluate(f"{outside}.map(e => e.outerHTML.slice(0, 120)).slice(0, 5)")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name",
                         ["../index", "index", "claims", "how", "failed", "table5", "beyond_compression"])
def test_axe_finds_nothing(browser, site, name, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page, _, _ = opened(browser, (site / "mini" / f"{name}.html").resolve(), scheme=scheme)
    found = Axe().run(page).response["violations"]
    assert not found, [(item["id"], item["help"], [node["html"][:160] for node in item["nodes"][:2]])
                       for item in found]
    page.context.close()


def test_by_keyboard(browser, site):
    """The first tab stop leads past the menu; what scrolls sideways can be reached and has a name."""
    page, _, _ = opened(browser, site / "mini" / "claims.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    nameless = page.evaluate("[...document.querySelectorAll('.scroll')]"
                             ".filter(e => e.tabIndex !== 0 || !e.getAttribute('aria-label')).length")
    assert nameless == 0
    page.context.close()


def test_verdicts_are_told_without_colour(browser, site):
    """Each verdict carries a sign of its own beside its colour, and the word for screen readers."""
    page, _, _ = opened(browser, site / "index.html")
    shown = page.evaluate("[...document.querySelectorAll('.chip .verdict')]"
                          ".map(e => [e.title, e.firstElementChild.textContent, e.textContent])")
    signs = {}
    for word, sign, text in shown:
        signs.setdefault(word, set()).add(sign)
        assert text.endswith(word)
    assert len(shown) > 80 and all(len(kinds) == 1 for kinds in signs.values())
    known = [word
             for word in ("reproduced", "not reproduced", "undecided", "not testable here") if word in signs]
    assert len({next(iter(signs[word])) for word in known}) == len(known) >= 3
    page.context.close()


def test_prints_without_cutting_a_table(browser, site):
    page, _, _ = opened(browser, site / "mini" / "table5.html", width=720)
    page.emulate_media(media="print")
    cut = page.evaluate("[...document.querySelectorAll('.scroll')].slice(0, 2)"
                        ".filter(e => e.scrollWidth > e.clientWidth + 1).length")
    assert cut == 0 and page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.context.close()


def test_a_number_leads_to_its_stage(browser, site):
    """From a claim to its table, from a number of the table to the record of its stages."""
    page, _, _ = opened(browser, site / "mini" / "claims.html")
    page.click("#average-dev a")
    assert page.url.endswith("/table5.html")
    page.click("tbody a.ours >> nth=0")
    place = page.url.partition("#")[2]
    text = page.evaluate("id => document.getElementById(id).nextElementSibling.textContent", place)
    assert place.startswith("finetune_glue-teacher-cola")
    assert all(word in text for word in ("./run_all.sh", "commit", "settings", "device", "inputs"))
    page.context.close()


def test_negative_results_are_taken_from_the_log():
    log = ("# Log\n\n## 2026-01-01 · first\n\n- kept `x`\n- (−) a <b>\n  second line\n\n"
           "## 2026-01-02 · second\n\n- all good\n")
    assert pages.negative_results(log) == [("2026-01-01 · first", ["(−) a <b> second line"])]
    text = pages.failed_page(log, [], "mini")
    assert "a &lt;b&gt; second line" in text and "all good" not in text
    committed = (ROOT / "LOG.md").read_text(encoding="utf-8")
    assert sum(len(points) for _, points in pages.negative_results(committed)) > 40


def test_how_it_was_made_says_the_command():
    text = pages.how_page(make(2), "midi",
                          {"seeds": 3, "tables": [4, 5], "overrides": ["readings.direction=teacher_student"]})
    assert "./run_all.sh --profile midi --only 4,5 --seeds 3 --set readings.direction=teacher_student" in text


def test_front_page_sets_profiles_side_by_side(tmp_path):
    for profile in ("mini", "midi"):
        (tmp_path / profile).mkdir()
        report.write_ledger(make(2), {}, profile, tmp_path / profile)
        (tmp_path / profile / "run.json").write_text('{"seeds": 2, "environment": {"device": "<b>"}}')
    text = report.write_front(tmp_path).read_text(encoding="utf-8")
    assert "ours, mini" in text and "ours, midi" in text and "&lt;b&gt;" in text and "2 seeds" in text
    assert set(re.findall(r'href="(m\w+)/claims.html#average-dev"', text)) == {"mini", "midi"}
