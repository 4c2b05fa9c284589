"""How report.html looks: in a browser at three widths, for a screen reader, and its colours' contrast."""

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from runfolders import build_all

from r1pipe.cli.report import write_report

WIDTHS = (390, 820, 1440)  # of a phone, a tablet and a desk
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LIMIT_S = 120
LEAST_CONTRAST = 4.5  # WCAG 2, level AA, of text
MEASURE = """
const blocks = "h1,h2,h3,h4,p,pre,figure,.wide,.facts div,summary,article,.step,dt,dd,ul.told li";
function named(e) {
  return e.tagName + "." + e.getAttribute("class") + " " + e.textContent.trim().slice(0, 40);
}
function apart(a, b) {
  return a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
}
function overlapping(elements) {
  const boxes = elements.map((e) => [e, e.getBoundingClientRect()]);
  const visible = boxes.filter(([e, box]) => box.width * box.height);
  const found = [];
  visible.forEach(([a, box], i) => visible.slice(i + 1).forEach(([b, other]) => {
    if (!a.contains(b) && !b.contains(a) && !apart(box, other)) found.push(named(a) + " / " + named(b));
  }));
  return found;
}
function measure(frame) {
  const page = frame.contentDocument, width = page.documentElement.clientWidth;
  page.querySelectorAll("details").forEach((each) => { each.open = true; });
  const all = [...page.body.querySelectorAll("*")].filter((e) => !e.closest("table, svg, .sr"));
  return {
    width,
    scroll: page.documentElement.scrollWidth,
    wider: all.filter((e) => e.getBoundingClientRect().right > width + 1).map(named),
    cut: all.filter((e) => !e.matches(".wide, .bar") && e.scrollWidth > e.clientWidth + 1 && e.clientWidth
      && getComputedStyle(e).overflowX != "visible").map(named),
    overlapping: overlapping([...page.querySelectorAll(blocks)]),
    labels: [...page.querySelectorAll("svg")].flatMap(
      (svg) => overlapping([...svg.querySelectorAll("text")])),
  };
}
addEventListener("load", () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
});
"""


BROKEN = """<p style="width: 600px">wide</p><p style="margin-top: -30px">over it</p>
<div style="width: 50px; overflow: hidden; white-space: nowrap">more than fits</div>
<svg><text y="20">left</text><text x="5" y="20">right</text></svg>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    build_all(root, seeds=(0, 1))
    return write_report(root)


def test_nothing_is_wider_than_the_window_cut_or_overlapping(report, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    shown = [(width, report.read_text(encoding="utf-8")) for width in WIDTHS]
    *measured, broken = measured_in(browser, tmp_path, [*shown, (390, BROKEN)])
    for width, found in zip(WIDTHS, measured, strict=True):
        assert found == {
            "width": width,
            "scroll": width,
            "wider": [],
            "cut": [],
            "overlapping": [],
            "labels": [],
        }
    assert broken["scroll"] > 390 and all(broken[key] for key in ("wider", "cut", "overlapping", "labels"))


def measured_in(browser: str, folder: Path, pages: list[tuple[int, str]]) -> list[dict]:
    """What the script finds in pages of these widths, each in a frame."""
    frames = "".join(
        f'<iframe width="{width}" height="800" srcdoc="{html.escape(page)}"></iframe>'
        for width, page in pages
    )
    outer = folder / "frames.html"
    outer.write_text(f'<!doctype html><meta charset="utf-8"><script>{MEASURE}</script>{frames}', "utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    line = [browser, *options, f"--user-data-dir={folder / 'profile'}", outer.as_uri()]
    dom = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title, "the script has run"
    return json.loads(html.unescape(title[1]))


def test_a_screen_reader_gets_every_picture_in_words_and_headings_in_order(report):
    text = report.read_text(encoding="utf-8")
    images = re.findall(r'role="img" aria-label="(.*?)"', text)
    assert len(images) == text.count("<svg") and all(re.search(r"\d", label) for label in images)
    levels = [int(level) for level in re.findall(r"<h([1-4])", text)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
    regions = re.findall(r'<div class="wide" (.*?)>', text)
    assert regions and all('tabindex="0"' in region and "aria-label=" in region for region in regions)
    targets = re.findall(r'<a href="#(\w+)"', text)
    assert targets == re.findall(r'<section id="(\w+)"', text)


def test_text_stands_out_from_its_ground_in_light_and_dark():
    style = (Path(__file__).parents[1] / "r1pipe/cli/report/templates/style.css").read_text()
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for name in ("ink", "muted", "link", "bad", "right", "wrong", "cut"):
            for ground in ("page", "raised"):
                assert contrast(colors[name], colors[ground]) >= LEAST_CONTRAST, (name, ground)


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio."""

    def luminance(color: str) -> float:
        shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
