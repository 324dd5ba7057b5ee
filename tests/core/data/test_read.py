"""Layouts of data that people have: recognised, read whole, and one sentence with the row for whatever does not fit."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from modelwright.core.data import read as reading
from modelwright.core.data.read import Chat, Document, Ids, Pair, Preference, Source, Text, read
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data

ENDINGS = [".jsonl", ".json", ".parquet"]


def write(rows: list[dict[str, Any]], file: Path) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


def source(rows: list[dict[str, Any]], folder: Path, ending: str = ".jsonl", **data: Any) -> Source:
    return Source(Data(str(write(rows, folder / f"rows{ending}")), **data))


def documents(of: Source) -> list[Document]:
    return [d for _, d in of]


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED, TOLD = turn("user", "sum?"), turn("assistant", "five")


# ---- layouts -------------------------------------------------------------------------------------------------------------
LAYOUTS: dict[str, tuple[dict[str, Any], str, Document]] = {
    "text": ({"text": "one two", "id": 3}, "text", Text("one two")),
    "only column": ({"body": "one two"}, "column body", Text("one two")),
    "messages": ({"messages": [ASKED, TOLD], "id": 3}, "messages", Chat([ASKED, TOLD])),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "sum?"}, {"from": "gpt", "value": "five"}], "id": "a"},
        "sharegpt",
        Chat([ASKED, TOLD]),
    ),
    "conversations with roles": ({"conversations": [ASKED, TOLD]}, "sharegpt", Chat([ASKED, TOLD])),
    "alpaca": ({"instruction": "sum?", "input": "", "output": "five"}, "alpaca", Pair("sum?", "five")),
    "alpaca with input": ({"instruction": "sum", "input": "two", "output": "five"}, "alpaca", Pair("sum\n\ntwo", "five")),
    "alpaca without inputs": ({"instruction": "sum?", "output": "five"}, "alpaca", Pair("sum?", "five")),
    "pairs of text": ({"prompt": "sum?", "completion": "five"}, "prompt and completion", Pair("sum?", "five")),
    "pairs of messages": ({"prompt": [ASKED], "completion": [TOLD]}, "prompt and completion", Chat([ASKED, TOLD])),
    "preferences": ({"prompt": "sum?", "chosen": "a", "rejected": "b"}, "chosen and rejected", Preference("sum?", "a", "b")),
    "preferences alone": ({"chosen": [TOLD], "rejected": [TOLD]}, "chosen and rejected", Preference(None, [TOLD], [TOLD])),
    "token ids": ({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, "token ids", Ids([5, 6, 7])),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised(name: str, ending: str, tmp_path: Path) -> None:
    row, layout, want = LAYOUTS[name]
    found = source([row, row], tmp_path, ending)
    assert found.format == layout and list(found) == [(1, want), (2, want)]


def test_a_column_that_is_named_goes_before_the_layout(tmp_path: Path) -> None:
    row = {"messages": [ASKED, TOLD], "text": "one", "notes": "two"}
    assert documents(source([row], tmp_path)) == [Chat([ASKED, TOLD])]
    assert documents(source([row], tmp_path, column="notes")) == [Text("two")]


def test_columns_that_only_later_rows_have_are_seen(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    assert documents(source(rows, tmp_path)) == [Pair("a", "b"), Pair("c\n\nd", "e")]


@pytest.mark.parametrize("ending", ENDINGS)
def test_content_in_parts_is_joined(ending: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "sum "}, {"type": "text", "text": "of two?"}]
    (chat,) = (
        documents(source([{"messages": [turn("user", parts), TOLD]}], tmp_path, ending))
        if ending != ".parquet"
        else documents(source([{"messages": [turn("user", parts), turn("assistant", parts[:1])]}], tmp_path, ending))
    )
    assert isinstance(chat, Chat) and chat.messages[0] == turn("user", "sum of two?")


def test_a_part_that_is_no_text_is_named_by_its_row(tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, TOLD]}, {"messages": [turn("user", [{"type": "image", "url": "x"}]), TOLD]}]
    with pytest.raises(UserError, match="row 2 of .* cannot be used, because message 0 has a part that is not text"):
        documents(source(rows, tmp_path))
    dropping = source(rows, tmp_path, refused="drop")
    assert documents(dropping) == [Chat([ASKED, TOLD])] and dropping.counts == {"rows refused": 1}


CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"a": "number"}}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["a list", "as text"])
def test_tool_calls_and_tools_are_kept(tools: Any, tmp_path: Path) -> None:
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, turn("tool", "5", name="sum"), TOLD]
    (chat,) = documents(source([{"messages": messages, "tools": tools}], tmp_path))
    assert isinstance(chat, Chat) and chat.tools == TOOLS
    assert chat.messages == [ASKED, turn("assistant", "", tool_calls=[CALL]), turn("tool", "5", name="sum"), TOLD]


# ---- pairs ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "completion", "want"),
    [
        ("sum?", [TOLD], Chat([ASKED, TOLD])),
        ([ASKED], "five", Chat([ASKED, TOLD])),
        (None, "five", Pair("", "five")),
        ("", "five", Pair("", "five")),
    ],
)
def test_pairs_of_text_and_messages_are_put_together(prompt: Any, completion: Any, want: Document, tmp_path: Path) -> None:
    assert documents(source([{"prompt": prompt, "completion": completion}], tmp_path)) == [want]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": [{"content": "x"}], "completion": [TOLD]},
        {"prompt": [ASKED], "completion": [{"role": "assistant"}]},
        {"prompt": [ASKED], "completion": ["five"]},
        {"prompt": ["sum?"], "completion": [TOLD]},
        {"prompt": 5, "completion": [TOLD]},
        {"prompt": {"a": 5}, "completion": "five"},
    ],
    ids=str,
)
def test_a_pair_that_does_not_fit_is_named_by_its_row(bad: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": [ASKED], "completion": [TOLD]}, bad]
    with pytest.raises(UserError, match="row 2 of .* cannot be used"):
        documents(source(rows, tmp_path))
    dropping = source(rows, tmp_path, refused="drop")
    assert documents(dropping) == [Chat([ASKED, TOLD])] and dropping.counts == {"rows refused": 1}


# ---- rows that hold nothing, or something else -----------------------------------------------------------------------------
@pytest.mark.parametrize("empty", [None, "", [], {}], ids=str)
@pytest.mark.parametrize("name", ["text", "messages", "alpaca", "pairs of text", "preferences", "token ids"])
def test_rows_without_text_are_counted(name: str, empty: Any, tmp_path: Path) -> None:
    row, _, want = LAYOUTS[name]
    if empty == {}:
        gone: dict[str, Any] = {}
    else:
        gone = dict.fromkeys(row, empty)
    found = source([row, gone, row], tmp_path)
    assert list(found) == [(1, want), (3, want)] and found.counts == {"rows without text": 1}


@pytest.mark.parametrize("bad", ["one two", [5, 6], ["a"], [5, "a"], 5, 5.5, True, {"role": "user", "content": "x"}, [[ASKED]]], ids=str)
def test_a_row_that_is_no_chat_among_chats_is_named_or_counted(bad: Any, tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, TOLD]}, {"messages": bad}, {"messages": [ASKED, TOLD]}]
    with pytest.raises(UserError, match="row 2 of .* cannot be used"):
        documents(source(rows, tmp_path))
    dropping = source(rows, tmp_path, refused="drop")
    assert list(dropping) == [(1, Chat([ASKED, TOLD])), (3, Chat([ASKED, TOLD]))] and dropping.counts == {"rows refused": 1}


def test_all_rows_of_a_kind_that_is_not_read_point_to_the_column(tmp_path: Path) -> None:
    for value in (5, {"a": "b"}, ["a"]):
        with pytest.raises(UserError, match="column 'x' of .* text, messages or token ids are needed; choose another column"):
            documents(source([{"x": value}], tmp_path))


def test_a_source_that_nobody_knows_is_named(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "martian", "value": "b"}]}]
    with pytest.raises(UserError, match="row 1 of .* message 1 is from 'martian'; known are human"):
        documents(source(rows, tmp_path))


# ---- limits --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ENDINGS)
def test_limit_counts_rows_of_a_table(ending: str, tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(40)]
    for limit in (1, 15, 16, 17, 39, 100):
        assert documents(source(rows, tmp_path, ending, limit=limit)) == [Text(f"row {i}") for i in range(min(limit, 40))]


@pytest.mark.parametrize("piece", [1 << 20, 16])
def test_limit_counts_lines_of_a_text_file_and_of_a_folder(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE", piece)
    lines = [f"line {i}\n" for i in range(20)]
    (tmp_path / "a.txt").write_text("".join(lines))
    for limit in (1, 7, 20, 50):
        assert read(Data(str(tmp_path / "a.txt"), limit=limit)) == ["".join(lines[:limit])]
    (tmp_path / "b.txt").write_text("".join(lines))
    assert read(Data(str(tmp_path), limit=25)) == ["".join(lines), "".join(lines[:5])]


# ---- encodings -----------------------------------------------------------------------------------------------------------
TEXTS = "größer\nals 😀"


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv"])
def test_the_mark_of_utf_8_is_read_and_never_becomes_text(ending: str, tmp_path: Path) -> None:
    content = {
        ".txt": TEXTS,
        ".jsonl": json.dumps({"text": TEXTS}, ensure_ascii=False) + "\n",
        ".json": json.dumps([{"text": TEXTS}], ensure_ascii=False),
        ".csv": f'text,id\n"{TEXTS}",1\n',
    }[ending]
    (tmp_path / f"t{ending}").write_bytes(content.encode("utf-8-sig"))
    assert read(Data(str(tmp_path / f"t{ending}"))) == [TEXTS]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("piece", [1 << 20, 5, 4, 3])
def test_text_is_the_same_in_each_encoding_and_in_blocks_of_any_size(
    encoding: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PIECE", piece)
    text = "größer\r\nals 😀\r\nund\r\rmehr\r\n"
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    (tmp_path / "t.txt").write_bytes(mark + text.encode(encoding))
    assert read(Data(str(tmp_path / "t.txt"))) == [text.replace("\r\n", "\n")]


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("content", ["größer".encode("latin-1"), b"\x89PNG\r\n\x1a\n\0\0", "größer".encode("utf-16-le"), b"gr\xc3"])
def test_bytes_that_are_no_utf_8_are_one_sentence(content: bytes, ending: str, tmp_path: Path) -> None:
    around = {".txt": b"%s", ".jsonl": b'{"text": "%s"}\n', ".json": b'[{"text": "%s"}]', ".csv": b"text,id\n%s,1\n"}[ending]
    (tmp_path / f"t{ending}").write_bytes(around % content)
    with pytest.raises(UserError, match="is not UTF-8|is not text|does not parse") as error:
        read(Data(str(tmp_path / f"t{ending}")))
    assert "\n" not in str(error.value)


def test_the_place_of_a_byte_that_is_no_text_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_bytes(b"0123456789\xff123")
    for piece in (1 << 20, 4, 3):
        monkeypatch.setattr(reading, "_PIECE", piece)
        with pytest.raises(UserError, match="byte 10 cannot be read"):
            read(Data(str(tmp_path / "t.txt")))
