"""The funnel: published and own numbers multiply out, stages hand everything on, a stopped run goes on."""

import json
from pathlib import Path

import pytest

from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.curate import web as module
from modelwright.curate.kernels.funnel import Stage, left, table
from modelwright.curate.web import Knobs, web

TEXT = (
    "The keeper of the lighthouse had to climb the stairs every evening in {}, and that was hard work in winter.\n"
    "He would carry the oil with him and fill the lamp before the sun went down behind the hills of {}.\n"
    "Ships that came from the north could see its light from a distance of {} miles or more.\n"
    "When the fog was thick, a bell had to be rung by hand until morning, which nobody in {} liked.\n"
    "In later years a machine was built by the people of {} to turn the light, so that he could sleep.\n"
)
PLACES = ["Skagen", "Dover", "Brest", "Bergen", "Vigo", "Malmö", "Turku", "Riga", "Gdynia", "Rostock"]


def texts() -> list[str]:
    """Ten documents, a copy, a near-copy, one that is too short, one with braces, one of a bad host."""
    made = [" ".join(f"{p}{i}{w}" if w.endswith("e") else w for w in TEXT.format(*[p] * 5).split(" ")) for i, p in enumerate(PLACES)]
    return [*made, made[0], made[1] + " Yes.", "Short.", made[2] + "{ }", made[3].replace("Bergen3", "Oslo")]


def data(folder: Path) -> Data:
    rows = [{"url": f"http://{'bad.com' if i == 14 else 'a.org'}/{i}", "text": t} for i, t in enumerate(texts())]
    (folder / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "hosts.csv").write_text("host,class\nbad.com,black\n")
    return Data(str(folder / "in.jsonl"))


def settings(folder: Path) -> Knobs:
    return Knobs(data=data(folder), rules={"use": ["gopher.words", "c4.curly_bracket"]}, safety={"domains": str(folder / "hosts.csv")})


def test_the_published_chain_multiplies_out() -> None:
    assert [float(f"{x:.3g}") for x in left([0.474, 0.378, 0.902, 0.143, 0.501])] == [0.526, 0.327, 0.0321, 0.0275, 0.0137]


def test_the_shares_are_products_and_equal_the_counts() -> None:
    rows = table([Stage("a", 1000, 600), Stage("b", 600, 450), Stage("c", 450, 0), Stage("d", 0, 0)])
    assert [r["left"] for r in rows] == [0.6, 0.45, 0, 0] and [r["removed"] for r in rows] == [0.4, 0.25, 1, 0]
    with pytest.raises(ValueError, match="a left 600 documents and b got 599"):
        table([Stage("a", 1000, 600), Stage("b", 599, 1)])


def test_every_document_is_kept_or_removed_by_one_stage(tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    facts = web(settings(tmp_path), out)
    assert [(r["stage"], r["before"], r["after"]) for r in facts["funnel"]] == [("rules", 15, 13), ("dedup", 13, 11), ("safety", 11, 10)]
    assert facts["funnel"][-1]["left"] == round(10 / 15, 6)
    removed = {s: len((out / f"removed-{s}.jsonl").read_text().splitlines()) for s in ("rules", "dedup", "safety")}
    assert removed == {"rules": 2, "dedup": 2, "safety": 1} and len((out / "dataset.jsonl").read_text().splitlines()) == 10
    assert sorted(f.name for f in out.iterdir()) == ["dataset.jsonl", *(f"removed-{s}.jsonl" for s in ("dedup", "rules", "safety"))]
    assert facts["top domains"] == {"a.org": 10}


def test_a_stopped_run_goes_on_after_the_last_whole_stage_and_ends_the_same(tmp_path: Path, monkeypatch) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    web(settings(tmp_path), tmp_path / "whole")
    calls: list[str] = []
    for stage in ("rules", "dedup", "safety"):
        own = module.MODULES[stage].METHOD

        def counted(*args, own=own, stage=stage):
            calls.append(stage)
            if stage == "safety" and calls.count("safety") == 1:
                raise KeyboardInterrupt
            return own(*args)

        monkeypatch.setattr(module.MODULES[stage], "METHOD", counted)
    with pytest.raises(KeyboardInterrupt):
        web(settings(tmp_path), tmp_path / "parts")
    web(settings(tmp_path), tmp_path / "parts")
    assert calls == ["rules", "dedup", "safety", "safety"]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_pages_go_through_all_stages(tmp_path: Path) -> None:
    (pages := tmp_path / "pages").mkdir()
    for i, t in enumerate(texts()):
        (pages / f"{i:02d}.html").write_text("<html><body><p>" + t.replace("\n", "</p><p>") + "</p></body></html>", encoding="utf-8")
    (out := tmp_path / "out").mkdir()
    facts = web(Knobs(pages=str(pages), extract={"how": "plain"}, rules={"use": ["gopher.words"]}), out)
    assert [r["before"] for r in facts["funnel"]] == [15, 15, 14, 11] and facts["extract"]["by plain"] == 15


@pytest.mark.parametrize(
    ("knobs", "say"),
    [
        ({}, "neither pages nor data"),
        ({"stages": ["rule"]}, "no stage 'rule'; did you mean 'rules'"),
        ({"stages": ["dedup", "rules"]}, "another order"),
        ({"data": Data("x.jsonl"), "dedup": {"treshold": 0.5}}, "unknown key 'dedup.treshold'"),
        ({"pages": "x", "stages": ["rules"]}, "without the stage extract"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_read(tmp_path: Path, knobs: dict, say: str) -> None:
    with pytest.raises(UserError, match=say):
        web(Knobs(**knobs), tmp_path)


def test_a_stage_that_leaves_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rules left no document, because it got 15"):
        web(Knobs(data=data(tmp_path), rules={"limits": {"gopher.words": [9000, 9999]}}), tmp_path)
