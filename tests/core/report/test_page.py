"""The report page: whole in one file, no network, correct in a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from modelwright.core.report.page import Report, Section
from modelwright.core.report.plots import draw

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
    asks = re.findall(r"""(?:src|href)\s*=\s*"(?!#|data:)[^"]*"|url\((?!#)[^)]*\)|@import[^;]*""", text)
    assert not asks and set(re.findall(r"https?://[^\s\"]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


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


SCATTER = {"kind": "scatter", "title": "S", "x": "new", "y": "old", "series": {"a": [[0, 1], [1, 2]]}}
HISTOGRAM = {"kind": "histogram", "title": "H", "x": "length", "y": "texts", "series": {"a": [1.0, 2.0, 2.5, 3.0]}}
IMAGE = {"kind": "image", "title": "I", "values": [[0.0, 1.0], [0.5, 0.2]]}
PANELS = {"kind": "panels", "title": "P", "plots": [LINE, HEAT]}
KINDS = [LINE, BARS, HEAT, SCATTER, HISTOGRAM, IMAGE, PANELS]


@pytest.mark.parametrize("plot", KINDS, ids=lambda p: p["kind"])
def test_every_kind_keeps_text_as_text_and_follows_the_theme(plot: dict) -> None:
    svg = draw(plot)
    assert "<svg" in svg and "#0102" not in svg, "every colour of ours became a variable of the page"
    if plot["kind"] != "image":
        assert "<text" in svg and "var(--" in svg
    assert draw(plot) == svg, "the same plot gives the same bytes"


def test_labels_stand_as_they_are_written() -> None:
    svg = draw({**LINE, "x": "cost in $ or $", "series": {"[/INST] <i>": [[0, 1], [1, 2]]}, "line": {"at": 1.5, "name": "chance & more"}})
    assert "cost in $ or $" in svg and "[/INST] &lt;i&gt;" in svg and "chance &amp; more" in svg


def test_ids_of_two_plots_on_a_page_differ() -> None:
    ids = [re.findall(r'id="([^"]+)"', draw({**LINE, "title": title})) for title in ("a", "b")]
    ids[1] = re.findall(r'id="([^"]+)"', draw({**LINE, "x": "other"}))
    assert not set(ids[0]) & set(ids[1])


def test_close_values_get_different_ticks() -> None:
    svg = draw({"kind": "line", "title": "t", "x": "x", "y": "y", "series": {"a": [[0, 1.37], [1, 1.373], [2, 1.375], [3, 1.377]]}})
    ticks = [float(v) for v in re.findall(r">(1\.37\d*)<", svg)]
    steps = [round(b - a, 6) for a, b in zip(ticks, ticks[1:], strict=False)]
    assert len(set(ticks)) == len(ticks) >= 3 and len(set(steps)) == 1


def test_text_of_a_report_is_printed_as_it_is(capsys: pytest.CaptureFixture) -> None:
    from rich.console import Console

    report = Report("r")
    table = {"title": "a[i] = b[j]", "columns": ["", "[x]"], "rows": [["[/INST]", "a[i] = b[j]"]]}
    report.sections.append(Section("[bold]", "text [/red]", [("[1]", "what", "")], [table]))
    report.print(Console(width=120))
    out = capsys.readouterr().out
    assert all(w in out for w in ("a[i] = b[j]", "[x]", "[/INST]", "[bold]", "text [/red]", "[1]"))


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


def test_training_curves_notes_samples_and_recipe_are_on_the_page() -> None:
    log = [{"step": s, "loss": 2.0 / s, "lr": 0.1, "grad_norm": 1.0} for s in (1, 2, 3)]
    report = Report("r", recipe="steps:\n- tune.full")
    report.step({"step": "tune.full", "log": log, "notes": ["half of the weights stood still"]})
    html = report.html()
    assert "gradient norm" in html and "half of the weights stood still" in html and "- tune.full" in html


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


def test_held_out_losses_stand_in_the_unit_of_their_objective_with_its_further_measures() -> None:
    evals = [{"step": s, "name": "pairs", "loss": 1.0 / (1 + s), "accuracy": 0.5 + s / 4, "tokens": 5} for s in (0, 1)]
    report = Report("r")
    report.step({"step": "reward.train", "evals": evals, "unit": "nats per pair"})
    table = next(t for t in report.sections[0].tables if t["title"].startswith("Held-out"))
    assert table["title"] == "Held-out text, nats per pair"
    assert table["rows"] == [["pairs", "1.0000", "0.5000"], ["pairs: accuracy", "0.5000", "0.7500"]]
