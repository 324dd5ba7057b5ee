"""Query of CC: queries are made, filtered and counted, each document says what found it, and everything is accounted for."""

import json
from pathlib import Path
from typing import Any

import pytest

from modelwright.core.errors import UserError
from modelwright.core.knobs import build
from modelwright.core.step import StepContext
from modelwright.curate.kernels.contamination import Evaluations
from modelwright.curate.kernels.queries import Pool, Query, questions_of
from modelwright.curate.kernels.yields import gini, host_name
from modelwright.curate.query import Knobs, query
from modelwright.testing import made

ANSWERS = (
    ("Questions about: lamp", "### Question 1\nHow does a fresnel lens work?\n### Question 2\nWhat does a wick do with oil?"),
    ("Thoughts about: How does a fresnel lens work?", "The glass rings bend light into a beam."),
    ("Thoughts about: What does a wick do with oil?", "I'm sorry, but I cannot help with that."),
)
DOCUMENTS = (
    ("a.org", "A lamp stands in a window and shines into the dark street."),
    ("a.org", "The fresnel lens was built of many parts by hand."),
    ("www.a.org", "Glass rings bend the light of a flame to one beam."),
    ("b.org", "A wick draws oil up from the bowl below it."),
    ("b.org", "Bread is baked of dough that rose for an hour."),
    ("c.org", "A wick draws oil up from the bowl below it!"),
)
FOUND = [0, 1, 2, 3, 5]


def write(folder: Path, documents: Any = DOCUMENTS, answers: Any = ANSWERS) -> dict[str, Any]:
    corpus, recorded = folder / "corpus.jsonl", folder / "recorded.jsonl"
    corpus.write_text("".join(json.dumps({"id": i, "url": f"http://{h}/{i}", "text": t}) + "\n" for i, (h, t) in enumerate(documents)))
    recorded.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in answers))
    return {"data": {"path": str(corpus)}, "recorded": str(recorded), "seeds": ["lamp"]}


def run(folder: Path, settings: dict[str, Any], name: str = "out", **more: Any) -> tuple[dict[str, Any], list[dict], list[dict]]:
    (out := folder / name).mkdir()
    result = query(build(Knobs, settings | more), StepContext(out))
    return result.metrics, *([json.loads(x) for x in (out / f"{f}.jsonl").read_text().splitlines()] for f in ("dataset", "removed"))


def test_questions_and_thoughts_find_what_the_seed_does_not(tmp_path: Path) -> None:
    settings = write(tmp_path)
    alone, first, _ = run(tmp_path, settings, "alone", questions=0, recorded=None)
    assert [r["id"] for r in first] == [0] and alone["requests"] == {"judge": "none", "requests": 0}
    _, breadth, _ = run(tmp_path, settings, "breadth", thoughts=False)
    metrics, rows, removed = run(tmp_path, settings)
    assert [r["id"] for r in breadth] == [0, 1, 3] and [r["id"] for r in rows] == [0, 1, 2, 3]
    assert [r["found"]["kind"] for r in rows] == ["seed", "question", "thought", "question"]
    assert rows[2]["found"]["query"] == ANSWERS[1][1] and rows[2]["found"]["seed"] == rows[2]["found"]["domain"] == "lamp"
    assert metrics["queries not used"]["thought: refusal"] == 1 and metrics["queries"] == 4
    assert [(r["row"], r["reason"], r["kept"]) for r in removed] == [(5, "exact", 3)]


def test_every_document_that_was_found_is_kept_or_removed_with_one_reason(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("He said: the FRESNEL lens was built, of many parts by hand\ntoo short\n")
    settings = write(tmp_path) | {"evaluation": {"exam": str(tmp_path / "test.txt")}, "ngram": 8, "per_host": 1}
    metrics, rows, removed = run(tmp_path, settings)
    assert {r["row"]: r["reason"] for r in removed} == {1: "evaluation exam", 5: "exact", 0: "host"}
    assert sorted([r["id"] for r in rows] + [r["row"] for r in removed]) == FOUND
    assert [(r["stage"], r["before"], r["after"]) for r in metrics["funnel"]] == [("evaluation", 5, 4), ("dedup", 4, 3), ("host", 3, 2)]
    assert metrics["kept"] == 2 and metrics["hosts"] == {"a.org": 1, "b.org": 1} and metrics["evaluation texts too short to look for"] == 1
    assert metrics["domains"] == [{"domain": "lamp", "seeds": 1, "queries": 4, "found": 5, "kept": 2}]


def test_the_search_ends_by_yield_and_counts_each_round(tmp_path: Path) -> None:
    lens, wick = "How does a fresnel lens work?", "What does a wick do with oil?"
    again = ((f"Questions about: {lens}", "Why oil, lens, wick?"), (f"Questions about: {wick}", ""))
    settings = write(tmp_path, answers=(*ANSWERS, *again))
    metrics, *_ = run(tmp_path, settings, rounds=5, least_yield=0.5)
    assert [r["new"] for r in metrics["rounds"]] == [1, 4, 0] and metrics["stopped"].startswith("round 2 yielded 0.000")
    assert metrics["rounds"][1]["yield"] == 1.0 and sum(r["new"] for r in metrics["rounds"]) == metrics["found"]
    metrics, *_ = run(tmp_path, settings, "few", queries=2)
    assert metrics["queries"] == 2 and metrics["stopped"] == "the queries were used up"
    assert metrics["queries not used"]["above the limit of queries"] == 2


def test_neither_shards_nor_a_second_run_change_a_byte(tmp_path: Path) -> None:
    settings = made("library", tmp_path / "data") | {"seeds": ["lamp", "oven"]}
    settings["data"] = {"path": settings["data"]}
    for name, shard in (("whole", 10**9), ("again", 10**9), ("cut", 1)):
        run(tmp_path, settings, name, shard=shard)
    for file in ("dataset", "removed", "queries"):
        assert len({(tmp_path / n / f"{file}.jsonl").read_bytes() for n in ("whole", "again", "cut")}) == 1


def test_queries_that_are_of_no_use_are_named() -> None:
    pool = Pool()
    texts = ["How is a lamp lit at night?", "how is a LAMP lit at night", "", "Why?", "w " * 65, "Sorry, I do not know that one."]
    assert [pool.add(Query(t, "question", 0, 1)) for t in texts] == [True, *[False] * 5]
    assert [k.split(": ")[1] for k in pool.dropped] == ["repeats a query", "empty", "too short", "too long", "refusal"]
    assert not pool.add(Query("At night, how is a lamp lit?", "question", 0, 1)) and pool.add(
        Query("At night how is a lamp lit", "thought", 0, 1)
    )
    assert pool.dropped["question: nearly repeats a query"] == 1


def test_questions_are_read_without_headings_too() -> None:
    assert questions_of("Sure:\n1. What is oil?\n- Why a wick?\nThat is all.") == ["What is oil?", "Why a wick?"]


def test_a_run_of_words_is_found_and_one_less_is_not() -> None:
    sets = Evaluations({"a": ["one two three four five six seven eight nine ten"], "b": ["p q r s t u v w"], "c": ["x y"]}, n=9)
    texts = ["ONE two, three four five six seven eight nine", "one two three four five six seven eight", "so p q r s t u v w x", "x y"]
    assert sets.of(texts) == [["a"], [], ["b"], []] and sets.short == 1
    assert [sets.of([t])[0] for t in texts] == sets.of(texts)


def test_hosts_and_their_share() -> None:
    assert [host_name(u) for u in ("http://WWW.a.org:80/x", "a.org/y", None, "http://[bad", "")] == ["a.org", "a.org", "", "", ""]
    assert gini([3, 3, 3]) == 0 and gini([0, 0, 0, 8]) == 0.75 and gini([]) == 0


@pytest.mark.parametrize(
    ("change", "say"),
    [
        ({"seeds": []}, "there are no seeds"),
        ({"recorded": None}, "no generator was given"),
        ({"seeds": ["zebra"]}, "no document was found"),
        ({"dedup": {"treshold": 1}}, "unknown key 'dedup.treshold'"),
        ({"seed_file": "none.txt"}, "no file at none.txt"),
        ({"evaluation": {"all": "corpus.jsonl"}, "ngram": 8}, "no document is left"),
    ],
)
def test_what_cannot_work_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], say: str) -> None:
    settings = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=say):
        run(tmp_path, settings, **change)
    assert not (tmp_path / "out" / "dataset.jsonl").exists()


def test_a_column_of_the_corpus_is_never_lost(tmp_path: Path) -> None:
    settings = write(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a lamp", "found": "by me"}\n')
    with pytest.raises(UserError, match="column 'found' already"):
        run(tmp_path, settings, questions=0, recorded=None)


def test_seeds_of_a_table_have_domains(tmp_path: Path) -> None:
    (tmp_path / "seeds.csv").write_text("seed,domain\nwick,light\nlens,light\ndough,food\n")
    settings = write(tmp_path) | {"seeds": [], "seed_file": str(tmp_path / "seeds.csv"), "questions": 0, "recorded": None}
    metrics, rows, _ = run(tmp_path, settings)
    assert [(d["domain"], d["seeds"], d["found"], d["kept"]) for d in metrics["domains"]] == [("light", 2, 3, 2), ("food", 1, 1, 1)]
    assert [r["found"]["domain"] for r in rows] == ["light", "light", "food"]
