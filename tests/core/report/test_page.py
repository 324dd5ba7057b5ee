"""The report page: whole in one file, no network, correct in a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from modelwright.core.report.page import Report, Section
from modelwright.core.report.plots import draw, ticks

LINE = {
    "kind": "line",
    "title": "Loss <b>",
    "x": "step",
    "y": "nats",
    "series": {"a & b": [[0, 3.0], [10, 2.0]], "b": [[0, 3.5], [10, float("nan")]]},
}
BARS = {
    "kind": "bars",
    "title": "Load",
    "y": "share",
    "groups": ["0", "1"],
    "series": {"x": [0.4, 0.6]},
    "line": {"at": 0.5, "name": "even"},
}
HEAT = {"kind": "heat", "title": "Heat", "x": "expert", "y": "layer", "columns": ["0", "1"], "rows": ["0"], "values": [[0.1, 0.9]]}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    report = Report("A <title>", lead="one & two")
    report.sections.append(
        Section(
            "Section",
            "Text",
            [("1.0", "what", "remark")],
            [{"title": "T", "columns": ["", "x"], "rows": [["row", "1"]]}],
            [LINE, BARS, HEAT],
            verdict=True,
        )
    )
    report.facts = {"seed": 0}
    file = tmp_path / "report.html"
    file.write_text(report.html(), encoding="utf-8")
    return file


def test_the_page_asks_the_network_for_nothing(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", text)


def test_names_from_outside_are_escaped(page: Path) -> None:
    text = page.read_text()
    assert "A &lt;title&gt;" in text and "Loss &lt;b&gt;" in text and "a &amp; b" in text and "<b>1.0</b>" in text


def test_the_page_is_well_formed(page: Path) -> None:
    class Balance(HTMLParser):
        open: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(page.read_text())
    assert parser.open == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.9, 2.4), (0, 0.003), (-2, 7), (5, 5), (0, 1e9)])
def test_ticks_cover_the_range_with_few_round_numbers(low: float, high: float) -> None:
    t = ticks(low, high)
    assert t[0] <= low and t[-1] >= high - 1e-9 * abs(high) and 2 <= len(t) <= 9 and t == sorted(set(t))


def test_a_point_lies_where_its_value_says() -> None:
    ys = [
        float(y)
        for y in re.findall(r'class="d0" cx="[\d.]+" cy="([\d.]+)"', draw({**LINE, "series": {"a": [[0, 1.0], [1, 2.0], [2, 3.0]]}}))
    ]
    assert ys[0] > ys[1] > ys[2] and abs((ys[0] - ys[1]) - (ys[1] - ys[2])) < 0.11


def test_bars_grow_from_zero_in_proportion() -> None:
    heights = [float(h) for h in re.findall(r'class="b0"[^>]*height="([\d.]+)"', draw(BARS))]
    assert heights[1] / heights[0] == pytest.approx(1.5, rel=0.01)


def test_no_two_of_twelve_series_look_alike() -> None:
    series = {str(i): [[0, i], [1, i]] for i in range(12)}
    html = draw({"kind": "line", "title": "t", "x": "x", "y": "y", "series": series})
    looks = re.findall(r'<polyline class="([^"]+)"', html)
    assert len(set(looks)) == 12 and [x.replace("s", "c", 1) for x in looks] == re.findall(r'<i class="([^"]+)"', html)


def test_a_step_entry_becomes_a_section() -> None:
    report = Report("r")
    report.step(
        {
            "step": "tune.full",
            "facts": {"tokens": 10},
            "evals": [{"step": s, "name": "new", "loss": 2.0 - s, "tokens": 5} for s in (0, 1)],
            "liveness": ["all moved"],
            "seconds": 1.0,
        }
    )
    assert report.sections[0].plots[0]["series"] == {"new": [[0, 2.0], [1, 1.0]]} and "all moved" in report.html()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_lays_it_out_without_overflow_or_errors(page: Path, width: int, tmp_path: Path) -> None:
    script = (
        "<script>window.onerror=e=>document.title='ERROR '+e;onload=()=>{const d=document.documentElement;"
        "document.title=JSON.stringify({over:d.scrollWidth-d.clientWidth,svgs:[...document.querySelectorAll('svg')].map(s=>s.getBoundingClientRect().height>50)})}</script>"
    )
    page.write_text(page.read_text().replace("</head>", script + "</head>"))
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--virtual-time-budget=2000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-500:]
    seen = json.loads(title[1])
    assert seen == {"over": 0, "svgs": [True, True, True]}
