"""From data to token rows: nothing lost, nothing learnt that should not be, and one sentence for whatever does not fit."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from modelwright.core.data.make import render_chat, tokenize
from modelwright.core.data.read import read
from modelwright.core.data.rows import IGNORE, Rows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.checkpoint import check_vocabulary

WORDS = [
    "<unk>",
    "<end>",
    "<system>",
    "<user>",
    "<assistant>",
    "<think>",
    "sum",
    "of",
    "two",
    "and",
    "three",
    "is",
    "five",
    "yes",
    "no",
    "please",
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
FORGETS = (
    "{% for m in messages %}<{{ m.role }}> {% if loop.last or m.role != 'assistant' %}{{ m.content }}{% else %}<think>{% endif %}"
    " <end> {% endfor %}"
)


class Numbers:
    """Stands in for a tokenizer: one id per letter."""

    eos_token_id: int | None = 1
    sep_token_id = None
    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()
    added_tokens_decoder: dict[int, str] = {}

    def __call__(self, texts: Any, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [ord(c) - 95 for c in texts] if isinstance(texts, str) else [[ord(c) - 95 for c in t] for t in texts]}


@pytest.fixture(scope="module")
def words() -> Any:
    """A real tokenizer of whole words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def stream(rows: Rows) -> list[int]:
    return [i for row, n in zip(rows.ids.tolist(), rows.lengths.tolist(), strict=True) for i in row[:n]]


def say(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


# ---- packing ---------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("abcdef", min_size=1, max_size=30), min_size=1, max_size=8), st.integers(2, 40))
def test_packing_keeps_every_token_and_ends_every_document_once(documents: list[str], context: int) -> None:
    want = [i for d in documents for i in [*Numbers()([d], add_special_tokens=False)["input_ids"][0], 1]]
    rows = tokenize(documents, Numbers(), 96, context)
    dropped = 1 if len(want) > context and len(want) % context == 1 else 0  # a last token alone in its row predicts nothing
    assert stream(rows) == want[: len(want) - dropped]
    assert rows.tokens == len(want) - dropped and rows.facts["documents"] == len(documents)
    assert stream(rows).count(1) + dropped == len(documents)
    assert rows.bytes == sum(map(len, documents))


def test_token_that_is_left_out_is_counted() -> None:
    rows = tokenize([[5, 6, 7, 8, 9]], None, 96, 4)
    assert rows.tokens + rows.facts.get("dropped tokens", 0) == 5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(2, 95), min_size=1, max_size=30), min_size=1, max_size=8), st.integers(2, 40))
def test_last_short_row_is_padded_and_masked_and_no_other(documents: list[list[int]], context: int) -> None:
    if sum(map(len, documents)) < 2:
        documents.append([5, 6])
    rows = tokenize(documents, None, 96, context)
    inside = torch.arange(rows.ids.shape[1]) < rows.lengths[:, None]
    assert rows.ids.shape == (len(rows), context) and rows.lengths[:-1].eq(context).all() and rows.lengths.min() >= 2
    assert torch.equal(rows.labels[inside], rows.ids[inside]) and rows.labels[~inside].eq(IGNORE).all() and rows.ids[~inside].eq(0).all()
    assert rows.facts["padded share"] == pytest.approx(1 - rows.tokens / (len(rows) * context)) and rows.bytes == 0


@pytest.mark.parametrize(("end", "want"), [(1, [5, 6, 1, 7, 8, 1]), (None, [5, 6, 7, 8])])
def test_token_ids_get_the_end_token_that_the_tokenizer_has(end: int | None, want: list[int]) -> None:
    tokenizer = Numbers()
    tokenizer.eos_token_id = end
    assert stream(tokenize([[5, 6], [7, 8]], tokenizer, 96, 4)) == want


def test_end_token_that_the_data_already_has_is_not_doubled() -> None:
    assert stream(tokenize([[5, 6, 1], [7, 8]], Numbers(), 96, 3)) == [5, 6, 1, 7, 8, 1]


def test_bytes_are_those_of_the_encoded_text(words: Any) -> None:
    assert tokenize(["sum of two", "größer"], words, 16, 4).bytes == 10 + 8


def test_real_text_survives_packing(stories: Path, shared: Path) -> None:
    from modelwright.core.model.checkpoint import Checkpoint

    tokenizer = Checkpoint(stories).tokenizer()
    text = (shared / "tinyshakespeare" / "input.txt").read_text()[:5000]
    rows = tokenize([text], tokenizer, 512, 128)
    assert tokenizer.decode(stream(rows), skip_special_tokens=True).strip() == text.strip() and stream(rows)[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("documents", [["a"], [[5]]])
def test_single_token_without_an_end_is_refused(documents: list[Any]) -> None:
    tokenizer = Numbers()
    tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="fewer than two"):
        tokenize(documents, tokenizer, 96, 8)


@pytest.mark.parametrize("bad", [96, -1, 2**31, 2**40, -(2**40)])
@pytest.mark.parametrize("context", [3, 8])
def test_token_id_out_of_range_is_named(bad: int, context: int) -> None:
    with pytest.raises(UserError, match=re.escape(f"{bad} is out of range")):
        tokenize([[5, 6], [7, bad, 8]], None, 96, context)


def test_largest_token_id_is_in_range() -> None:
    assert stream(tokenize([[0, 95, 5]], None, 96, 3)) == [0, 95, 5]


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        tokenize(["text"], None, 96, 8)


@pytest.mark.parametrize("documents", [[[1.5, 2.5]], [["sum", "of"]], [[None, 5]], [[5, None]], [[[5, 6]]]], ids=str)
def test_lists_that_are_neither_token_ids_nor_messages_are_refused(documents: list[Any], words: Any) -> None:
    with pytest.raises(UserError):
        tokenize(documents, words, 16, 8)


def test_foreign_tokenizer_is_refused(words: Any) -> None:
    check_vocabulary(words, 16, "here")
    check_vocabulary(None, 1, "here")
    with pytest.raises(UserError, match="its highest id is 15"):
        check_vocabulary(words, 15, "here")


# ---- rows ------------------------------------------------------------------------------------------------------------
def test_split_shares_rows_and_bytes() -> None:
    rows = tokenize(["abcdefgh", "abcdef"], Numbers(), 96, 4)
    first, rest = rows.split(1)
    assert (len(first), len(rest)) == (1, 3) and stream(first) + stream(rest) == stream(rows)
    assert (first.bytes, rest.bytes) == (round(14 * 4 / 16), round(14 * 12 / 16))


def test_batch_is_cut_to_its_longest_row_and_masked_where_needed() -> None:
    ids = torch.arange(12, dtype=torch.int32).view(3, 4)
    rows = Rows(ids, ids.clone(), torch.tensor([2, 3, 3]))
    batch = collate([rows[0], rows[2]])
    assert batch["input_ids"].tolist() == [[0, 1, 2], [8, 9, 10]] and batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["example_id"].tolist() == [0, 2] and batch["labels"].dtype == torch.int64
    assert "attention_mask" not in collate([rows[1], rows[2]])


# ---- chats -----------------------------------------------------------------------------------------------------------
CHATS = {
    "one turn": say(("user", "sum of two and three"), ("assistant", "five")),
    "two turns": say(("user", "sum of two and three"), ("assistant", "is five"), ("user", "please"), ("assistant", "yes")),
    "with a system": say(("system", "please sum"), ("user", "two"), ("assistant", "two yes")),
    "ends with the user": say(("user", "sum"), ("assistant", "of"), ("user", "no")),
    "two assistants": say(("user", "sum"), ("assistant", "of"), ("assistant", "two")),
    "assistant first": say(("assistant", "please"), ("user", "no"), ("assistant", "yes")),
}


@pytest.mark.parametrize("name", CHATS)
def test_only_what_the_assistant_says_is_learnt(name: str, words: Any) -> None:
    chat = CHATS[name]
    ids, mask = render_chat(words, chat)
    assert ids == words.apply_chat_template(chat, return_dict=False) and len(mask) == len(ids)
    learnt = words.decode([i for i, m in zip(ids, mask, strict=True) if m]).split()
    said = [[*m["content"].split(), "<end>"] for m in chat if m["role"] == "assistant"]
    want = [sum(said, [])] + (
        [sum(said[1:], [])] if chat[0]["role"] == "assistant" else []
    )  # an opening that answers nothing may be left out
    assert learnt in want


def test_masks_of_chats_reach_the_labels(words: Any) -> None:
    rows = tokenize([CHATS["one turn"], CHATS["two turns"]], words, 16, 64)
    for i, chat in enumerate((CHATS["one turn"], CHATS["two turns"])):
        ids, mask = render_chat(words, chat)
        assert rows.ids[i, : rows.lengths[i]].tolist() == ids
        assert rows.labels[i].tolist() == [t if m else IGNORE for t, m in zip(ids, mask, strict=True)] + [IGNORE] * (
            rows.ids.shape[1] - len(ids)
        )
    assert rows.facts["cut at the context"] == 0 and rows.facts["documents"] == 2


def test_cut_chats_are_counted(words: Any) -> None:
    rows = tokenize(list(CHATS.values()), words, 16, 10)
    assert rows.facts["cut at the context"] == sum(len(render_chat(words, c)[0]) > 10 for c in CHATS.values()) > 0
    assert rows.ids.shape[1] == 10 and rows.lengths.max() == 10


def test_chats_whose_answers_are_all_cut_off_are_refused(words: Any) -> None:
    with pytest.raises(UserError, match="no token of the data is to be learnt"):
        tokenize([CHATS["one turn"]], words, 16, 4)


@pytest.mark.parametrize("template", [FORGETS, "{{ messages[-1].content }}"])
def test_template_that_rewrites_history_is_refused(template: str, words: Any) -> None:
    words.chat_template = template
    try:
        with pytest.raises(UserError, match="does not show what the assistant says|cannot be told apart"):
            render_chat(words, CHATS["two turns"])
    finally:
        words.chat_template = TEMPLATE


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        tokenize([CHATS["one turn"]], None, 96, 8)


@pytest.mark.parametrize(
    "message", [{"content": "yes"}, {"role": "user"}, {"from": "nobody", "value": "yes"}, {"role": "user", "text": "yes"}, {}], ids=str
)
def test_message_without_role_or_content_is_refused(message: dict[str, str], words: Any) -> None:
    with pytest.raises(UserError, match="has no (role|content)|is from"):
        tokenize([[*CHATS["one turn"], message]], words, 16, 64)


# ---- reading ---------------------------------------------------------------------------------------------------------
TABLE: dict[str, list[Any]] = {"text": ["one\nline", 'two, "three"', "größer\u2028than"], "extra": ["x", "y", "z"]}


def write(table: dict[str, list[Any]], file: Path) -> Path:
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif file.suffix == ".csv":
        import csv

        with open(file, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(table))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.table(table), file)
    return file


TABLES = [".jsonl", ".json", ".csv", ".parquet"]


@pytest.mark.parametrize("ending", TABLES)
def test_tables_are_read_by_column(ending: str, tmp_path: Path) -> None:
    file = str(write(TABLE, tmp_path / f"t{ending}"))
    assert read(Data(file)) == TABLE["text"]
    assert read(Data(file, column="extra")) == TABLE["extra"]
    assert read(Data(file, limit=2)) == TABLE["text"][:2]
    with pytest.raises(UserError, match="did you mean 'extra'"):
        read(Data(file, column="extr"))


@pytest.mark.parametrize("ending", TABLES)
def test_only_column_needs_no_name_and_one_of_many_does(ending: str, tmp_path: Path) -> None:
    assert read(Data(str(write({"anything": ["a", "b"]}, tmp_path / f"one{ending}")))) == ["a", "b"]
    with pytest.raises(UserError, match="they are a, b"):
        read(Data(str(write({"a": ["x"], "b": ["y"]}, tmp_path / f"two{ending}"))))


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_token_ids_and_messages_are_read_from_tables(ending: str, tmp_path: Path) -> None:
    assert read(Data(str(write({"input_ids": [[5, 6], [7]], "n": [1, 2]}, tmp_path / f"ids{ending}")))) == [[5, 6], [7]]
    chats = [CHATS["one turn"], CHATS["two turns"]]
    assert read(Data(str(write({"id": ["a", "b"], "messages": chats}, tmp_path / f"chat{ending}")))) == chats


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_empty_rows_are_left_out(ending: str, tmp_path: Path) -> None:
    assert read(Data(str(write({"text": ["a", "", None, "b"]}, tmp_path / f"t{ending}")))) == ["a", "b"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_document_longer_than_a_read_block_is_read(ending: str, tmp_path: Path) -> None:
    long = "a line of a long document\n" * 80_000  # 2 MB
    assert read(Data(str(write({"text": ["short", long, "short"]}, tmp_path / f"t{ending}")))) == ["short", long, "short"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_text_that_looks_like_a_date_stays_text(ending: str, tmp_path: Path) -> None:
    dates = ["2020-01-31", "2021-12-01"]
    assert read(Data(str(write({"text": dates}, tmp_path / f"t{ending}")))) == dates


@pytest.mark.parametrize("ending", TABLES)
def test_column_of_numbers_is_refused(ending: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text, messages or token ids are needed"):
        read(Data(str(write({"n": [1, 2]}, tmp_path / f"t{ending}"))))


@pytest.mark.parametrize("ending", [".txt", ".md", ".py"])
def test_text_file_is_one_document(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"t{ending}").write_text("größer\n\nthan this", encoding="utf-8")
    assert read(Data(str(tmp_path / f"t{ending}"))) == ["größer\n\nthan this"]


def test_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (("b/1.txt", "second"), ("a.md", "first"), ("c.txt", ""), ("d.png", "no text"), ("e.bin", "no text")):
        (tmp_path / name).write_text(text)
    assert read(Data(str(tmp_path))) == ["first", "second"]


@pytest.mark.parametrize("content", [b"good \xff good", b"caf\xe9", b"good \0 bad"])
def test_bytes_that_are_no_text_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match="is not UTF-8|is not text"):
        read(Data(str(tmp_path / "t.txt")))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_of_an_encoding_are_read_and_never_become_text(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("größer\nals".encode(encoding))
    assert read(Data(str(tmp_path / "t.txt"))) == ["größer\nals"]


@pytest.mark.parametrize("ending", [".txt", *TABLES])
def test_empty_file_is_refused(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"t{ending}").write_bytes(b"")
    with pytest.raises(UserError, match="empty|no text"):
        read(Data(str(tmp_path / f"t{ending}")))


@pytest.mark.parametrize("ending", [".json", ".csv", ".parquet"])
def test_table_without_rows_is_refused(ending: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no text"):
        read(Data(str(write({"text": []}, tmp_path / f"t{ending}"))))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("t.json", b'{"text": "a"}'),
        ("t.json", b"[1, 2]"),
        ("t.json", b"[{]"),
        ("t.json", b"\xff\xfe["),
        ("t.parquet", b"PAR1 not"),
        ("t.csv", b'a,b\n1\n"2,3,4\n'),
        ("t.jsonl", b'{"text": "a"}\n{"text": ["a"]}\n'),
    ],
)
def test_damaged_table_is_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="does not parse|holds lists|is not UTF-8"):
        read(Data(str(tmp_path / name)))


def test_json_with_a_list_of_texts_is_one_sentence_or_read(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('["a", "b"]')
    try:
        assert read(Data(str(tmp_path / "t.json"))) == ["a", "b"]
    except UserError as error:
        assert "does not parse" in str(error)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        (None, "no data was given"),
        ("gone.txt", "no data at"),
        ("gone.jsonl", "no data at"),
        ("./gone", "no data at"),
        ("/gone/away", "no data at"),
    ],
)
def test_missing_data_is_refused(path: str | None, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read(Data(path))


def test_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.xls").write_text("x")
    with pytest.raises(UserError, match="unknown ending '.xls'"):
        read(Data(str(tmp_path / "t.xls")))


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(UserError, match="holds no text"):
        read(Data(str(tmp_path)))
