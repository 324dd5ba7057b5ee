"""Score files: every layout gives the same scores; each mistake is one sentence."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from modelwright.core.errors import UserError
from modelwright.reward.table.scores import markdown, ordered_pairs, read

ROWS = [
    {
        "id": i,
        "scores_chosen": float(i),
        "scores_rejected": 2.5,
        "text_chosen": "ab" * (i + 1),
        "text_rejected": "# a\n- b",
        "subset": "xy"[i % 2],
    }
    for i in range(6)
]


def write(path: Path, rows: list[dict]) -> Path:
    if path.name.endswith(".gz"):
        inner = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(inner.read_bytes()))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as out:
            table = csv.DictWriter(out, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "a.json.gz"])
def test_every_format_gives_the_same_scores(name: str, tmp_path: Path) -> None:
    s = read(write(tmp_path / name, ROWS), ["length", "markdown"])
    assert s.score.tolist() == [0, 1, 2, 3, 4, 5] + [2.5] * 6 and s.features["length"].tolist() == [2, 4, 6, 8, 10, 12] + [7] * 6
    assert s.features["markdown"].tolist() == [0] * 6 + [2] * 6
    assert (s.score[s.better] > s.score[s.worse]).sum() == 3 and s.parts == ["x", "y"] and s.part.tolist() == [0, 1] * 3


def test_columns_of_rewardbench_eval_set_scores_are_read(tmp_path: Path) -> None:
    whole = {k: [r[k] for r in ROWS] for k in ROWS[0]} | {"model": "a/b", "scores_chosen": [[r["scores_chosen"]] for r in ROWS]}
    whole["text_chosen"] = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": r["text_chosen"]}] for r in ROWS]
    (tmp_path / "a.json").write_text(json.dumps(whole))
    s = read(tmp_path / "a.json", ["length"])
    assert s.score.tolist() == [0, 1, 2, 3, 4, 5] + [2.5] * 6 and s.features["length"][:6].tolist() == [2, 4, 6, 8, 10, 12]


def test_columns_are_mapped_and_features_may_be_columns(tmp_path: Path) -> None:
    rows = [{"win": 1.0, "lose": 0.0, "chosen_tokens": 5, "rejected_tokens": 6, "len_a": 3, "len_b": 4} for _ in range(2)]
    columns = {"scores_chosen": "win", "scores_rejected": "lose", "length_chosen": "len_a", "length_rejected": "len_b"}
    s = read(write(tmp_path / "a.jsonl", rows), ["tokens", "length"], columns)
    assert s.features["tokens"].tolist() == [5, 5, 6, 6] and s.features["length"].tolist() == [3, 3, 4, 4]


def test_tokens_are_counted_with_a_tokenizer(stories: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    s = read(write(tmp_path / "a.jsonl", ROWS), ["tokens"], tokenizer=str(stories))
    assert s.features["tokens"][0] == len(tokenizer.encode("ab", add_special_tokens=False))


def test_groups_of_any_size_compare_all_pairs_of_different_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    group, label = rng.integers(0, 12, 80), rng.integers(0, 4, 80)
    literal = {(i, j) for i in range(80) for j in range(80) if group[i] == group[j] and label[i] > label[j]}
    assert set(zip(*(x.tolist() for x in ordered_pairs(group, label)), strict=True)) == literal
    rows = [{"prompt": f"p{g}", "score": 1.0, "good": bool(v > 1), "length": 3} for g, v in zip(group, label, strict=True)]
    s = read(write(tmp_path / "a.jsonl", rows), ["length"], {"group": "prompt", "label": "good"})
    assert len(s.better) == sum(label[i] > 1 >= label[j] for i in range(80) for j in range(80) if group[i] == group[j])


def test_scores_without_labels_have_no_comparisons(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "a.jsonl", [{"score": 1, "text": "a"}, {"score": 2, "text": "b"}]), ["length"]).better) == 0


def test_markdown_counts_headers_items_and_bold() -> None:
    assert markdown("# A\n\n  ## B\n- one\n* two\n1. three\n**bold** and __bold__\n#no\n-no") == 7


def test_names_that_differ_in_a_leading_zero_are_two(tmp_path: Path) -> None:
    rows = [("01", 0.9, 1), ("01", 0.1, 0), ("1", 0.2, 0), ("1", 0.8, 1), ("2", 0.5, 1), ("2", 0.4, 0)]
    s = read(write(tmp_path / "a.jsonl", [{"group": g, "score": v, "label": w, "length": 3} for g, v, w in rows]), ["length"])
    assert len(s.better) == 3 and s.ids["group"] == [g for g, _, _ in rows]
    assert (
        len(read(write(tmp_path / "b.jsonl", [r | {"id": i} for r, i in zip(ROWS[:2], ("007", "7"), strict=True)]), ["length"]).better) == 2
    )


def test_names_in_a_csv_that_differ_in_a_leading_zero_are_two(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("group,score,label,length\n01,.9,1,3\n01,.1,0,3\n1,.2,0,3\n1,.8,1,3\n2,.5,1,3\n2,.4,0,3\n")
    s = read(tmp_path / "a.csv", ["length"])
    assert len(s.better) == 3 and sorted(set(s.ids["group"])) == ["01", "1", "2"]


BAD = {
    "neither 'scores_chosen' .* nor 'score'": [{"a": 1}],
    "has no column 'scores_rejected'": [{"scores_chosen": 1}],
    "row 2 .* has a score for one side only, because a pair has two": [ROWS[0], ROWS[1] | {"scores_rejected": None}],
    "row 2 of 'scores_chosen' .* is 'high', because a finite number is needed": [ROWS[0], ROWS[1] | {"scores_chosen": "high"}],
    "row 1 of 'scores_chosen' .* is nan": [ROWS[0] | {"scores_chosen": float("nan")}],
    "row 1 of 'scores_chosen' .* is \\[1, 2\\]": [ROWS[0] | {"scores_chosen": [1, 2]}],
    "id 0 stands twice": [ROWS[0], ROWS[0]],
    "row 2 .* has no id, because it would be compared": [ROWS[0], ROWS[1] | {"id": None}],
    "row 2 .* has no group": [{"score": 1, "text": "a", "group": g, "label": v} for g, v in (("a", 0), (None, 1))],
    "row 1 of 'scores_chosen' .* is beyond 1e100": [ROWS[0] | {"scores_chosen": 10**400}],
    "row 2 of 'scores_rejected' .* is beyond 1e100": [ROWS[0], ROWS[1] | {"scores_rejected": -1e308}],
    "row 1 of 'scores_rejected' .* is inf": [ROWS[0] | {"scores_rejected": float("inf")}],
    "neither a column 'length_chosen' nor 'text_chosen'": [{"scores_chosen": 1, "scores_rejected": 0}],
    "row 1 .* has no text, because it holds '5'": [ROWS[0] | {"text_chosen": 5}],
    "group 'b' .* has one response only, because a comparison needs two": [
        {"score": 1, "text": "a", "group": g, "label": v} for g, v in (("a", 0), ("a", 1), ("b", 1))
    ],
}


@pytest.mark.parametrize("said", BAD)
def test_a_bad_row_is_one_sentence(said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read(write(tmp_path / "a.jsonl", BAD[said]), ["length"])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "{", "does not parse"),
        ("a.json", '{"a": 1}', "does not parse as a table"),
        ("a.json", '{"a": [1], "b": [1, 2]}', "columns of one length"),
        ("a.json", "{", "does not parse"),
        ("a.jsonl", "", "is empty"),
        ("a.xyz", "a", "unknown ending"),
        ("a.jsonl.gz", "a", "does not parse"),
    ],
)
def test_a_broken_file_is_one_sentence(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read(tmp_path / name, ["length"])


@pytest.mark.parametrize(
    ("features", "columns", "said"),
    [
        (["lenght"], {}, "no column 'lenght_chosen' for the feature 'lenght'"),
        (["tokens"], {}, "give a tokenizer"),
        (["length"], {"scores_chosn": "id"}, "did you mean 'scores_chosen'"),
        (["length"], {"id": "idd"}, "no column 'idd'.*did you mean 'id'"),
    ],
)
def test_a_missing_feature_or_column_is_one_sentence(features: list[str], columns: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read(write(tmp_path / "a.jsonl", ROWS), features, columns)


def test_a_missing_file_or_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file at"):
        read(tmp_path / "none.jsonl", ["length"])
    with pytest.raises(UserError, match="no tokenizer at"):
        read(write(tmp_path / "a.jsonl", ROWS), ["tokens"], tokenizer=str(tmp_path))
