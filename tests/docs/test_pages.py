"""The generated pages are current, whole and honest."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from modelwright import registry
from modelwright.cli import app
from modelwright.runner import recipe as recipes
from modelwright.runner import run as runs

ROOT = Path(__file__).parents[2]


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


markdown_of = _module("markdown_of")
generate = _module("generate")
METHODS = [e.name for e in registry.METHODS]


@pytest.fixture(scope="module")
def pages() -> dict[Path, str]:
    return generate.pages()


# ---- current and whole -----------------------------------------------------------------------------------------------
def test_committed_pages_are_current(pages: dict[Path, str]) -> None:
    assert not generate.outdated(pages), "run `make docs` and commit what it changes"


def test_a_page_that_is_old_missing_or_left_over_is_found(pages: dict[Path, str]) -> None:
    one, *rest = (f for f in pages if f.parent.name == "tune")
    changed = {**pages, one: pages[one] + "more"}
    del changed[rest[0]]
    assert generate.outdated(changed) == sorted(str(f.relative_to(ROOT)) for f in (one, rest[0]))
    new = ROOT / "docs" / "methods" / "tune" / "new.md"
    assert generate.outdated({**pages, new: ""}) == [str(new.relative_to(ROOT))]


def test_every_benchmark_was_judged_as_it_stands() -> None:
    dates = {name: r["date"] for name, r in generate.results().items()}
    judged = {name: str(date) for name, date in generate.verdicts()["judged"].items()}
    assert judged == dates, "read the new outcome, then mend the verdicts and the date in docs/verdicts.yaml"


def test_every_benchmark_is_the_proof_of_a_claim() -> None:
    used = {c["proof"] for claims in generate.verdicts()["claims"].values() for c in claims}
    assert set(generate.results()) <= used


def test_claims_are_whole_and_their_proofs_exist() -> None:
    for name, claims in generate.verdicts()["claims"].items():
        assert name == "kernel" or name in METHODS, name
        for c in claims:
            assert set(c) == {"claim", "verdict", "found", "proof"} and all(isinstance(v, str) and v for v in c.values()), c
            assert c["verdict"] in generate.VERDICTS
            assert c["proof"] in generate.results() or (ROOT / c["proof"]).is_file(), c["proof"]


def test_proofs_is_an_index_of_one_line_per_method(pages: dict[Path, str]) -> None:
    text = pages[ROOT / "PROOFS.md"]
    for name in METHODS:
        assert len(re.findall(rf"^\| \[`{re.escape(name)}`\]", text, re.MULTILINE)) == 1
    assert len(text.encode()) < 400 * (len(METHODS) + 10)


@pytest.mark.parametrize("name", METHODS)
def test_a_page_has_its_parts_and_the_knobs_last(name: str, pages: dict[Path, str]) -> None:
    text = pages[ROOT / "docs" / "methods" / f"{name.replace('.', '/')}.md"]
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads[-1] == "Knobs" and {"How to run it", "Proofs"} <= set(heads)
    assert ("## Verdict" in text) == (name in generate.verdicts()["claims"])
    own = [n for n, _ in generate.flat(generate.registry.knobs(registry.entry(name)))]
    for knob in own:
        assert f"`{knob}`" in text or knob.split(".")[0] in generate.SHARED_KNOBS


def test_every_table_of_a_benchmark_stands_on_one_page(pages: dict[Path, str]) -> None:
    for name in generate.results():
        assert sum(text.count(f"\n### {name}\n") for text in pages.values()) == 1


def test_links_between_pages_lead_somewhere(pages: dict[Path, str]) -> None:
    by_hand = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    written = {**{f: f.read_text() for f in by_hand}, **pages}
    for file, text in written.items():
        for link in re.findall(r"\]\((?!https?://)([^)#\s]*)(#[^)\s]*)?\)", text):
            target = (file.parent / link[0]).resolve() if link[0] else file
            assert target.exists(), f"{file.name} links to {link[0]}"
            if link[1]:
                assert f"### {link[1][1:]}\n" in written[target], f"{file.name} links to {''.join(link)}"


def test_what_did_not_hold_stands_first(pages: dict[Path, str]) -> None:
    for text in pages.values():
        for line in [part for part in text.splitlines() if "**held**" in part and "**not held**" in part]:
            assert line.index("**not held**") < line.index("**held**")


# ---- commands --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_the_command_of_a_page_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def understood(recipe: Any, *more: Any, **named: Any) -> None:
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_recipe", understood)
    monkeypatch.setattr(recipes, "check", lambda recipe: [])
    with pytest.raises(SystemExit) as end:
        app.main(generate.command(registry.entry(name))[1:])
    assert end.value.code == 130 and [s.entry.name for s in seen[0].steps] == [name]


def test_the_command_says_what_the_recipe_says() -> None:
    import shlex

    words = generate.command(registry.entry("tune.c_rlft"))
    assert words[:3] == ["modelwright", "tune", "c-rlft"] and "--train.accumulate" in words
    assert words[words.index("--weights") + 1] == '{"gpt4": 1.0, "gpt3.5": 0.1}'
    assert shlex.split(generate.written(words).replace("\\\n", " ")) == words
    assert max(map(len, generate.written(words).splitlines())) <= 120


# ---- docstrings ------------------------------------------------------------------------------------------------------
def test_a_docstring_is_split_at_its_markers() -> None:
    parts = markdown_of.docstring(
        "A thing. Ours: its name.\n\nWhat for: speed.\n\nIt adds\n    y = a * b\nup. No official code was found.\nOurs: the rest."
        "\n\n- one,\n  two\n- three"
    )
    assert parts["intro"] == ["A thing.", ""] and parts["what for"] == ["What for: speed.", ""]
    assert parts["ours"] == ["Ours: its name.", "", "Ours: the rest.", ""]
    assert parts["official"] == ["No official code was found.", ""]
    assert parts["method"] == ["It adds", "", "```text", "y = a * b", "```", "", "up.", "", "- one,", "  two", "- three", ""]


def test_no_word_of_a_docstring_is_lost() -> None:
    for e in registry.METHODS:
        doc = registry.doc(e)
        text = " ".join(line for lines in markdown_of.docstring(doc).values() for line in lines)
        made = text.replace("```text", "").replace("```", "").replace("\\", "").replace("&lt;", "<").split()
        assert sorted(made) == sorted(doc.replace("\\", "").split()), e.name


def test_cells_and_text_are_themselves_in_markdown() -> None:
    assert markdown_of.cell("a | b\n<c>") == "a \\| b &lt;c>" and markdown_of.cell(0.123456) == "0.1235"
    assert markdown_of.table(["x"], [[1.0], ["y|z"]]) == ["| x |", "|---|", "| 1 |", "| y\\|z |"]
    assert markdown_of.docstring("x.\n\nr* < `a_b*` and _p")["method"][0] == "r\\* &lt; `a_b*` and \\_p"
