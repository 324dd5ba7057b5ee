"""Duplicates: one of each cluster stays, whatever the order of files, and every removal is accounted for."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.curate.dedup import Knobs, dedup
from modelwright.curate.kernels.clusters import labels

WORDS = [f"w{i}" for i in range(4000)]


def made(n: int, seed: int = 0, length: int = 120) -> list[dict]:
    rng = random.Random(seed)
    return [{"id": f"d{i}", "text": " ".join(rng.choices(WORDS, k=length)), "date": f"20{10 + i % 9}"} for i in range(n)]


def changed(text: str, words: int, seed: int) -> str:
    """Some words at the end are others."""
    rng, parts = random.Random(seed), text.split()
    return " ".join(parts[:-words] + rng.choices(WORDS, k=words)) if words else text


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def run(folder: Path, path: Path, **knobs) -> tuple[dict, list[dict], list[dict]]:
    folder.mkdir()
    facts = dedup(Knobs(data=Data(str(path)), **knobs), folder)
    kept, removed = ([json.loads(line) for line in (folder / f).read_text().splitlines()] for f in ("dataset.jsonl", "removed.jsonl"))
    assert sorted(f.name for f in folder.iterdir()) == ["dataset.jsonl", "removed.jsonl"], "nothing else is left behind"
    return facts, kept, removed


def planted(n: int = 60) -> list[dict]:
    rows = made(n)
    twins = [r | {"id": r["id"] + "-twin", "text": r["text"].upper().replace(" ", "  "), "date": "2001"} for r in rows[:10]]
    near = [r | {"id": r["id"] + "-near", "text": changed(r["text"], 6, i), "date": "2030"} for i, r in enumerate(rows[10:30])]
    far = [r | {"id": r["id"] + "-far", "text": changed(r["text"], 80, i)} for i, r in enumerate(rows[30:40])]
    return rows + twins + near + far


def test_planted_duplicates_are_removed_and_only_they(tmp_path: Path) -> None:
    facts, kept, removed = run(tmp_path / "out", write(tmp_path / "d.jsonl", planted()))
    ids = {r["id"] for r in kept}
    assert facts["exact"] == 10 and facts["near"] == 20 and len(kept) == 70
    assert {f"d{i}-near" for i in range(10, 30)} < ids, "the newest copy stays"
    assert {f"d{i}" for i in range(10)} < ids and {f"d{i}-far" for i in range(30, 40)} < ids
    assert len(kept) + len(removed) == facts["documents"] == 100
    assert len({r["row"] for r in removed}) == len(removed) and {r["reason"] for r in removed} == {"exact", "near"}
    assert sum(r["copies"] for r in kept) == 100


@pytest.mark.parametrize(("keep", "stays"), [("newest", "c"), ("longest", "b"), ("first", "a")])
def test_who_stays_is_a_rule(tmp_path: Path, keep: str, stays: str) -> None:
    text = made(1)[0]["text"]
    rows = [
        {"id": "a", "text": text, "date": "2011"},
        {"id": "b", "text": text + " more", "date": "2012"},
        {"id": "c", "text": text, "date": "2013"},
        {"id": "d", "text": text, "date": "2013"},
        {"id": "e", "text": text, "date": None},
    ]
    _, kept, _ = run(tmp_path / "out", write(tmp_path / "d.jsonl", rows), keep=keep)
    assert [r["id"] for r in kept] == [stays] and kept[0]["copies"] == 5


def test_many_files_and_small_batches_equal_one_file(tmp_path: Path, monkeypatch) -> None:
    from modelwright.curate.kernels import documents

    rows = planted()
    one, many = write(tmp_path / "one.jsonl", rows), tmp_path / "many"
    many.mkdir()
    for i in range(0, 100, 30):
        (many / f"{i:03d}.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows[i : i + 30]).encode()))
    run(tmp_path / "a", one)
    monkeypatch.setattr(documents.Source.__init__, "__kwdefaults__", {"batch": 1000})
    run(tmp_path / "b", many)
    for name in ("dataset.jsonl", "removed.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_order_of_rows_changes_who_is_first_but_not_the_clusters(tmp_path: Path) -> None:
    rows = planted()
    mixed = random.Random(1).sample(rows, len(rows))
    a = run(tmp_path / "a", write(tmp_path / "a.jsonl", rows))[1]
    b = run(tmp_path / "b", write(tmp_path / "b.jsonl", mixed))[1]
    assert {(r["id"], r["copies"]) for r in a} == {(r["id"], r["copies"]) for r in b}


def test_unverified_candidates_may_be_below_the_threshold_and_verified_ones_not(tmp_path: Path) -> None:
    rows = made(40)
    rows += [r | {"id": r["id"] + "-half", "text": changed(r["text"], 40, i)} for i, r in enumerate(rows)]
    file = write(tmp_path / "d.jsonl", rows)
    loose = run(tmp_path / "loose", file, verify=False, bands=[32, 2])
    strict = run(tmp_path / "strict", file, verify=True, bands=[32, 2])
    assert loose[0]["near"] > 30 and loose[0]["near, below the threshold to the one kept"] == loose[0]["near"]
    assert strict[0]["near"] == 0 and strict[0]["candidate pairs"] > 30


def test_the_similarity_written_is_the_exact_jaccard(tmp_path: Path) -> None:
    _, _, removed = run(tmp_path / "out", write(tmp_path / "d.jsonl", rows := planted()))

    def shingles(text: str) -> set[tuple[str, ...]]:
        parts = text.lower().split()
        return {tuple(parts[i : i + 5]) for i in range(len(parts) - 4)}

    for r in removed:
        a, b = shingles(rows[r["row"]]["text"]), shingles(rows[r["kept"]]["text"])
        assert r["similarity"] == pytest.approx(len(a & b) / len(a | b), abs=1e-4)


def test_short_documents_are_compared_exactly_and_no_cluster_of_their_own(tmp_path: Path) -> None:
    rows = [{"text": t} for t in ("one two", "One, two!", "one three", "", "", "?!", "...")]
    _, kept, _ = run(tmp_path / "out", write(tmp_path / "d.jsonl", rows))
    assert [r["text"] for r in kept] == ["One, two!", "one three", "", "?!", "..."]


def test_without_near_only_equal_ones_go(tmp_path: Path) -> None:
    facts, kept, _ = run(tmp_path / "out", write(tmp_path / "d.jsonl", planted()), near=False)
    assert facts["near"] == 0 and len(kept) == 90


def test_labels_are_the_components_of_a_plain_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        pairs = rng.integers(0, 60, (int(rng.integers(0, 60)), 2))
        root = list(range(60))

        def find(x: int, root: list[int] = root) -> int:
            while root[x] != x:
                x = root[x]
            return x

        for a, b in pairs.tolist():
            low, high = sorted((find(a), find(b)))
            root[high] = low
        assert labels(60, pairs).tolist() == [find(i) for i in range(60)]
    chain = np.stack([np.arange(999), np.arange(1, 1000)], 1)
    assert (labels(1000, rng.permutation(chain)) == 0).all()


def test_rows_that_cannot_be_read_are_counted_by_file_and_nothing_else_is_lost(tmp_path: Path) -> None:
    good = [json.dumps(r) for r in made(6)]
    lines = [
        good[0],
        "{broken",
        good[1],
        "[1]",
        json.dumps({"text": 5}),
        json.dumps({"other": "x"}),
        "",
        good[2],
        '{"text": "\\ud800 a \\u0000 b"}',
    ]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines))
    whole = gzip.compress("".join(line + "\n" for line in good[3:] * 2000).encode())
    (folder / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    facts, kept, _ = run(tmp_path / "out", folder)
    assert {k for k in facts if k.startswith("dropped")} == {
        "dropped: lines that are no json (a.jsonl)",
        "dropped: lines that hold no object (a.jsonl)",
        "dropped: rows whose 'text' is no text (a.jsonl)",
        "dropped: rows without 'text' (a.jsonl)",
        "dropped: rest of a damaged gz file (b.jsonl.gz)",
    }
    assert {r["id"] for r in kept} == {f"d{i}" for i in range(6)} | {None} and len(kept) == 7


def test_a_line_without_end_is_counted_and_skipped(tmp_path: Path, monkeypatch) -> None:
    from modelwright.curate.kernels import documents

    monkeypatch.setattr(documents, "LINE", 4096)
    rows = made(2, length=20)
    (tmp_path / "d.jsonl").write_text(json.dumps(rows[0]) + "\n" + '{"text": "' + "x" * 50_000 + '"}\n' + json.dumps(rows[1]) + "\n")
    facts, kept, _ = run(tmp_path / "out", tmp_path / "d.jsonl")
    assert [r["id"] for r in kept] == ["d0", "d1"] and any("lines above" in k for k in facts)


def test_what_cannot_work_is_one_sentence(tmp_path: Path) -> None:
    empty, wrong = tmp_path / "e.jsonl", write(tmp_path / "w.jsonl", [{"body": "x"}])
    empty.write_text("")
    for data, say in (
        (Data(), "no data was given"),
        (Data(str(tmp_path / "none")), "no such file"),
        (Data(str(empty)), "holds no documents"),
        (Data(str(wrong)), "no column 'text'"),
    ):
        with pytest.raises(UserError, match=say):
            dedup(Knobs(data=data), tmp_path)
    with pytest.raises(UserError, match="bands"):
        dedup(Knobs(data=Data(str(wrong), "body"), bands=[3]), tmp_path)
