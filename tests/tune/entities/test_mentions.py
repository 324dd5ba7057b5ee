"""Where vectors stand in a text: before the mention with the mark between, and what is learnt of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_bert
from modelwright.core.data.rows import IGNORE
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.tune.entities.mentions import Sentence, mention_rows, read_sentences, splice
from modelwright.tune.entities.vectors import read_vectors

TEXT = "In Paris lived Marie Curie / a chemist"
BOTH = Sentence(TEXT, [(3, 8, "Q90"), (15, 26, "Q7186")])
PLACES = {"Q90": 1000, "Q7186": 1001}


@pytest.fixture(scope="module")
def bert() -> Any:
    return tiny_bert.tokenizer_of([TEXT] * 3)


def words(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(f"<{i}>" if i >= 1000 else tokenizer.convert_ids_to_tokens(i) for i in ids).replace(" ##", "")


def made(
    tokenizer: Any, sentence: Sentence = BOTH, places: dict[str, int] = PLACES, context: int = 64, **how: Any
) -> list[tuple[list, list]]:
    rows = mention_rows([sentence], tokenizer, places, context, **{"masked": True, **how})
    return [(rows.ids[i, :n].tolist(), rows.labels[i, :n].tolist()) for i, n in enumerate(rows.lengths.tolist())]


def test_two_linked_mentions_give_three_rows_with_head_tail_and_both_hidden(bert: Any) -> None:
    found = made(bert)
    assert len(found) == 3
    for (ids, labels), hidden in zip(found, (["Paris"], ["Marie", "Curie"], ["Paris", "Marie", "Curie"]), strict=True):
        want = "[CLS] In <1000> / Paris lived <1001> / Marie Curie / a chemist [SEP]"
        learnt = [t for t in labels if t != IGNORE]
        assert words(bert, learnt).split() == hidden
        whole = [t if t != IGNORE else i for i, t in zip(ids, labels, strict=True)]
        assert words(bert, whole) == want
        assert all((i == bert.mask_token_id) == (t != IGNORE) for i, t in zip(ids, labels, strict=True))


def test_a_decoder_gets_one_row_and_learns_every_spliced_mention() -> None:
    tokenizer = Checkpoint("seedling").tokenizer()
    ((ids, labels),) = made(tokenizer, masked=False)
    assert tokenizer.decode([i for i in ids if i < 1000 or i >= 1002]).replace(" ", "").count("/") == 3
    assert tokenizer.decode([t for t in labels if t != IGNORE]).replace(" ", "") == "ParisMarieCurie"
    assert all(t in (IGNORE, i) for i, t in zip(ids, labels, strict=True))


def test_a_mention_without_a_vector_stays_as_it_is(bert: Any) -> None:
    ((ids, labels),) = made(bert, places={"Q90": 1000})
    assert words(bert, [t for t in labels if t != IGNORE]) == "Paris" and 1001 not in ids


def test_control_hides_the_same_pieces_without_vectors_and_marks(bert: Any) -> None:
    with_, without = made(bert), made(bert, plain=True)
    assert [[t for t in y if t != IGNORE] for _, y in with_] == [[t for t in y if t != IGNORE] for _, y in without]
    assert [len(a) - 4 for a, _ in with_] == [len(b) for b, _ in without] and not any(i >= 1000 for b, _ in without for i in b)


def test_no_row_is_cut_between_a_vector_and_its_mention(bert: Any) -> None:
    n = len(made(bert)[0][0])
    assert len(made(bert, context=n)) == 3
    with pytest.raises(UserError, match="longer than the context: 1"):
        made(bert, context=n - 1)


def test_overlapping_mentions_are_spliced_once(bert: Any) -> None:
    found = made(bert, Sentence(TEXT, [(15, 20, "Q90"), (15, 26, "Q7186")]))
    assert all(i.count(1000) + i.count(1001) == 1 for i, _ in found)


def test_splicing_is_inserting(bert: Any) -> None:
    encoded = bert(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    out = splice(BOTH, encoded["input_ids"], encoded["offset_mapping"], PLACES, bert("/", add_special_tokens=False)["input_ids"])
    drop = {at + k for at in out.vectors for k in (0, 1)}
    assert [t for i, t in enumerate(out.ids) if i not in drop] == encoded["input_ids"]


def test_fewrel_and_spans_give_the_same_sentence(tmp_path: Path) -> None:
    tokens = TEXT.split()
    rows = [
        {"text": TEXT, "entities": [{"id": "Q7186", "start": 15, "end": 26}, {"id": "Q90", "start": 3, "end": 8}]},
        {"tokens": tokens, "h": ["marie curie", "Q7186", [[3, 4]]], "t": ["paris", "Q90", [[1]]]},
        {"tokens": tokens, "head": {"type": "Q7186", "indices": [[3, 4]]}, "tail": {"type": "Q90", "indices": [[1]]}},
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_sentences(Data(path=str(tmp_path / "s.jsonl"))) == [BOTH] * 3


@pytest.mark.parametrize(
    "row", [{"text": "x"}, {"text": "x", "entities": [{"id": "Q1", "start": 0, "end": 5}]}, {"tokens": ["x"], "h": ["x", "Q1", [[3]]]}]
)
def test_row_without_a_usable_mention_is_named(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="row 1 .* no linked mentions"):
        read_sentences(Data(path=str(tmp_path / "s.jsonl")))


def test_vectors_are_read_from_npz_parquet_and_jsonl_alike(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    ids, values = ["Q1", "Q2"], [[1.0, 2.0], [3.0, 4.5]]
    np.savez(tmp_path / "v.npz", ids=np.array(ids), vectors=np.array(values))
    parquet.write_table(pa.table({"id": ids, "vector": values}), tmp_path / "v.parquet")
    (tmp_path / "v.jsonl").write_text("".join(json.dumps({"id": i, "vector": v}) + "\n" for i, v in zip(ids, values, strict=True)))
    for name in ("v.npz", "v.parquet", "v.jsonl"):
        found = read_vectors(str(tmp_path / name))
        assert found.places == {"Q1": 0, "Q2": 1} and torch.equal(found.values, torch.tensor(values))


@pytest.mark.parametrize(
    ("ids", "values", "words"),
    [
        (["Q1", "Q2"], [[1.0], [float("nan")]], "Q2 .* not finite"),
        (["Q1", "Q1"], [[1.0], [2.0]], "stands twice"),
        (["Q1", "Q2"], [[1.0]], "2 ids and 1 vectors"),
    ],
)
def test_vectors_that_cannot_be_used_are_refused(ids: list[str], values: list[Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", ids=np.array(ids), vectors=np.array(values))
    with pytest.raises(UserError, match=words):
        read_vectors(str(tmp_path / "v.npz"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "Q1", "vector": [1.0]}, {"id": "Q2", "vector": [1.0, 2.0]}], "several widths"),
        ([{"id": "Q1", "vector": None}], "no vector"),
        ([{"id": "Q1"}], "no column 'vector'"),
    ],
)
def test_table_without_whole_vectors_is_refused(rows: list[Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match=words):
        read_vectors(str(tmp_path / "v.jsonl"))
