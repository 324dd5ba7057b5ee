"""Stores of token rows: made once, never half, never stale; pieces give the ids of the whole; what is left out is counted."""

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from chats import FAMILIES, KINDS, say, tokenizer_of
from modelwright.core.data import make, read, store
from modelwright.core.data.make import make_rows, tokenize
from modelwright.core.data.rows import IGNORE, TokenRows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.knobs import Source as Part

TEXT = "sum of two and three\nis five.\n\nyes, please\n  no\nthe answer\n" * 6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own for each test."""
    monkeypatch.setenv("MODELWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each batch that is tokenised."""
    seen: list[int] = []
    for name in ("_plain", "_with_offsets"):
        real = getattr(make.Encoder, name)

        def counted(self: Any, texts: list[str], real: Any = real) -> Any:
            if texts != ["\n"]:
                seen.append(len(texts))
            return real(self, texts)

        monkeypatch.setattr(make.Encoder, name, counted)
    return seen


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer_of("byte level", "chatml")


def write(rows: list[dict[str, Any]], file: Path) -> Data:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Data(str(file))


def rows_of(data: Data, tokenizer: Any, context: int = 32, **more: Any) -> TokenRows:
    return make_rows(data, tokenizer, 2000, context, **more)


def stream(rows: TokenRows) -> list[int]:
    return torch.cat([rows[i]["input_ids"] for i in range(len(rows))]).tolist()


def stores(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.is_dir())


# ---- the store -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["text", "chats"])
def test_the_second_call_does_not_tokenise(kind: str, tmp_path: Path, tokenizer: Any, calls: list[int]) -> None:
    if kind == "text":
        (tmp_path / "t.txt").write_text(TEXT)
        data = Data(str(tmp_path / "t.txt"))
    else:
        data = write([{"messages": say("two?", "yes")}] * 3, tmp_path / "t.jsonl")
    first = rows_of(data, tokenizer)
    n = len(calls)
    again, other = rows_of(data, tokenizer), rows_of(data, tokenizer, context=16)
    assert n > 0 and len(calls) == n and stream(first) == stream(again)
    assert kind == "chats" or stream(other) == stream(first)
    assert again.facts == first.facts and again.stops == first.stops and again.tokens == first.tokens


@pytest.mark.parametrize("changed", ["file", "tokenizer", "template", "limit", "column", "kind"])
def test_whatever_changes_the_rows_makes_a_new_store(changed: str, tmp_path: Path, cache: Path, calls: list[int]) -> None:
    rows = [{"messages": say("two?", "yes"), "other": say("two?", "no")}] * 3
    data, before = write(rows, tmp_path / "t.jsonl"), tokenizer_of("byte level", "chatml")
    first, n = rows_of(data, before), len(calls)
    more: dict[str, Any] = {}
    if changed == "file":
        data = write([{"messages": say("two?", "noo")}] * 3, tmp_path / "t.jsonl")
    elif changed == "limit":
        data = Data(data.path, limit=2)
    elif changed == "column":
        data = Data(data.path, column="other")
    elif changed == "template":
        import copy

        before = copy.deepcopy(before)
        before.chat_template = before.chat_template.replace("'\n'", "' '")
    elif changed == "tokenizer":
        before = tokenizer_of("byte level", "qwen 3")
    else:
        data = write([{"text": "a b c"}], tmp_path / "u.jsonl")
        rows_of(data, before)
        n, more = len(calls), {"kind": "masked"}
    second = rows_of(data, before, **more)
    assert len(calls) > n and len(stores(cache)) == (3 if changed == "kind" else 2)
    assert changed == "kind" or stream(first) != stream(second)


def test_a_store_that_was_cut_off_is_made_again(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    data = Data(str(tmp_path / "t.txt"))
    want = stream(rows_of(data, tokenizer))
    (name,) = stores(cache)
    (cache / name / "facts.json").unlink()  # written last
    (cache / name / "ids.bin").write_bytes(b"1234")
    (cache / f"{name}.part").mkdir()
    (cache / f"{name}.part" / "ids.bin").write_bytes(b"12")
    assert stream(rows_of(data, tokenizer)) == want and stores(cache) == [name]


def test_a_run_that_is_stopped_leaves_no_store(tmp_path: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write([{"text": "one two"}] * 3, tmp_path / "t.jsonl")
    add = store.StoreWriter.add

    def stop(self: Any, *args: Any) -> None:
        add(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(store.StoreWriter, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            rows_of(data, tokenizer)
    assert stores(cache) == []
    assert rows_of(data, tokenizer).tokens > 0


@pytest.mark.parametrize("file", ["ids.bin", "learnt.bin", "ends.npy", "firsts.npy", "facts.json"])
def test_a_full_disk_is_one_sentence_and_nothing_is_left(
    file: str, tmp_path: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins
    import io

    data, real = write([{"messages": say("two?", "yes")}] * 3, tmp_path / "t.jsonl"), builtins.open

    def full(path: Any, *args: Any, **kwargs: Any) -> Any:  # what is written there fails as on a full disk
        return real("/dev/full" if str(path).endswith(file) and str(cache) in str(path) else path, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(builtins, "open", full)
        m.setattr(io, "open", full)
        with pytest.raises(UserError, match="no disk space left for") as error:
            rows_of(data, tokenizer)
    assert "\n" not in str(error.value) and stores(cache) == []
    assert rows_of(data, tokenizer).tokens > 0


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MODELWRIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write"):
        rows_of(write([{"text": "one two"}], tmp_path / "t.jsonl"), tokenizer)


def _make_in_a_process(path: str, log: str) -> None:
    real = make._write_store

    def slow(*args: Any) -> None:
        with open(log, "a") as f:
            f.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        real(*args)

    make._write_store = slow  # type: ignore[assignment]
    assert stream(make_rows(Data(path), None, 2000, 16)) == list(range(64))


def test_two_processes_at_once_make_one_store(tmp_path: Path, cache: Path) -> None:
    data = write([{"input_ids": list(range(64))}], tmp_path / "t.jsonl")
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_make_in_a_process, args=(data.path, str(tmp_path / "log"))) for _ in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    assert len((tmp_path / "log").read_text().split()) == 1 and len(stores(cache)) == 1


def test_stores_that_nobody_used_for_a_month_are_removed(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    rows_of(write([{"text": "one"}], tmp_path / "a.jsonl"), tokenizer)
    old = stores(cache)
    for p in cache.iterdir():
        os.utime(p, (0, 0))
    rows_of(write([{"text": "two"}], tmp_path / "b.jsonl"), tokenizer)
    assert len(stores(cache)) == 1 and stores(cache) != old


# ---- texts -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("piece", [8, 17, 40, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_file_give_the_ids_of_the_whole(kind: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind, "olmo")
    (tmp_path / "t.txt").write_text(TEXT)
    monkeypatch.setattr(read, "_PIECE", piece)
    pieces = list(read.Source(Data(str(tmp_path / "t.txt"))))
    assert len(pieces) > 1 and "".join(p.text for _, p in pieces) == TEXT  # type: ignore[union-attr]
    rows = rows_of(Data(str(tmp_path / "t.txt")), tokenizer)
    want = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert stream(rows) == want[: rows.tokens] and rows.tokens + rows.facts["dropped tokens"] == len(want)
    assert rows.bytes == len(TEXT.encode()) and rows.facts["documents"] == 1


def test_each_file_of_a_folder_ends_once(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_PIECE", 40)
    (tmp_path / "d").mkdir()
    for name in "abc":
        (tmp_path / "d" / f"{name}.txt").write_text(TEXT + name)
    rows = rows_of(Data(str(tmp_path / "d")), tokenizer)
    assert stream(rows).count(tokenizer.eos_token_id) == 3 and rows.facts["documents"] == 3


def test_what_the_tokenizer_puts_before_a_text_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    from tokenizers import processors

    tokenizer = copy.deepcopy(tokenizer_of("byte level", "llama 3"))
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    monkeypatch.setattr(read, "_PIECE", 40)
    (tmp_path / "t.txt").write_text(TEXT)
    want = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    assert stream(rows_of(Data(str(tmp_path / "t.txt")), tokenizer, context=4096)) == want


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv"])
def test_the_mark_of_an_encoding_never_becomes_a_token(ending: str, tmp_path: Path, tokenizer: Any) -> None:
    content = {".txt": "yes no", ".jsonl": '{"text": "yes no"}\n', ".json": '[{"text": "yes no"}]', ".csv": 'text,id\n"yes no",1\n'}[ending]
    (tmp_path / f"t{ending}").write_bytes(content.encode("utf-8-sig"))
    assert stream(rows_of(Data(str(tmp_path / f"t{ending}")), tokenizer)) == [
        *tokenizer("yes no", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]


# ---- rows that cannot be used ----------------------------------------------------------------------------------------------
GOOD = {"messages": say("two?", "yes")}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "half a surrogate pair": ({"messages": say("two?", "\ud83d")}, "half of a surrogate pair"),
    "half a surrogate pair of the user": ({"messages": say("\ude00?", "yes")}, "half of a surrogate pair"),
    "no role": ({"messages": [{"content": "yes"}]}, "has no role"),
    "not a chat": ({"messages": "yes"}, "holds text where the others hold messages"),
    "a number": ({"messages": 5}, "holds int values"),
    "the template raises": ({"messages": [{"role": "martian", "content": "yes"}]}, "the chat template refuses it: martians"),
    "a missing field": ({"messages": [{"role": "tool", "content": "yes"}]}, "the chat template refuses it"),
}


@pytest.fixture
def strict() -> Any:
    """A template that refuses a role, and uses a field that only some messages have."""
    import copy

    tokenizer = copy.deepcopy(tokenizer_of("byte level", "chatml"))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m['role'] == 'martian' %}{{ raise_exception('martians are not known') }}{% endif %}"
        "{% if m['role'] == 'tool' %}{{ m['name'] + ':' }}{% endif %}",
        1,
    )
    return tokenizer


@pytest.mark.parametrize("name", BAD)
def test_a_chat_that_cannot_be_used_is_named_by_its_row_or_counted(name: str, tmp_path: Path, strict: Any) -> None:
    bad, why = BAD[name]
    data = write([GOOD, GOOD, bad, GOOD], tmp_path / "t.jsonl")
    with pytest.raises(UserError, match=f"row 3 of .*t.jsonl cannot be used, because .*{why}") as error:
        rows_of(data, strict)
    assert "\n" not in str(error.value)
    rows = rows_of(Data(data.path, refused="drop"), strict)
    assert len(rows) == 3 and rows.facts["rows refused"] == 1 and rows.facts["documents"] == 3


def test_a_text_that_cannot_be_used_is_named_by_its_row_or_counted(tmp_path: Path, tokenizer: Any) -> None:
    data = write([{"text": "yes"}, {"text": "no \udc00"}, {"text": "two"}, {"text": None}], tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="row 2 of .* half of a surrogate pair"):
        rows_of(data, tokenizer)
    rows = rows_of(Data(data.path, refused="drop"), tokenizer)
    assert rows.facts["rows refused"] == 1 and rows.facts["rows without text"] == 1 and rows.facts["documents"] == 2
    assert tokenizer.decode(stream(rows), skip_special_tokens=True) == "yestwo"


def test_data_of_which_nothing_is_left_is_refused_with_the_counts(tmp_path: Path, tokenizer: Any) -> None:
    empty = write([{"text": None}, {"text": ""}], tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="holds no text, because rows without text: 2"):
        rows_of(empty, tokenizer)
    silent = write([{"messages": say("two?")}, {"messages": [{"role": "system", "content": "yes"}]}], tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="no token of the data is to be learnt, because left out: nothing to learn: 2"):
        rows_of(silent, tokenizer)
    bad = write([{"messages": [{"content": "yes"}]}] * 2, tmp_path / "c.jsonl")
    with pytest.raises(UserError, match="because rows refused: 2"):
        rows_of(Data(bad.path, refused="drop"), tokenizer)


def test_chats_without_an_answer_are_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    silent = [{"messages": say("two?")}, {"messages": [{"role": "system", "content": "yes"}]}]
    rows = rows_of(write([GOOD, *silent], tmp_path / "t.jsonl"), tokenizer)
    assert len(rows) == 1 and rows.facts["left out: nothing to learn"] == 2 and rows.facts["documents"] == 3


@pytest.mark.parametrize("packing", [False, True])
def test_a_prompt_longer_than_the_context_is_left_out_and_counted(packing: bool, tmp_path: Path, tokenizer: Any) -> None:
    long = {"messages": say("two? " * 30, "yes")}
    rows = rows_of(write([GOOD, long, GOOD], tmp_path / "t.jsonl"), tokenizer, context=40, packing=packing)
    assert rows.facts["left out: prompt longer than the context"] == 1 and rows.facts["cut at the context"] == 1
    good = rows_of(write([GOOD], tmp_path / "g.jsonl"), tokenizer)
    assert rows.tokens == 2 * good.tokens and rows.facts["documents"] == 3
    with pytest.raises(UserError, match="no token of the data is to be learnt.*raise train.context"):
        rows_of(write([long], tmp_path / "u.jsonl"), tokenizer, context=40, packing=packing)


def test_two_answers_to_a_prompt_are_refused_where_one_is_learnt(tmp_path: Path, tokenizer: Any) -> None:
    data = write([{"prompt": "two?", "chosen": "yes", "rejected": "no"}], tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="two answers to each prompt.*learns from one.*reward or preference"):
        rows_of(data, tokenizer)


def test_a_masked_model_with_hardly_any_context_is_one_sentence(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="context"):
        rows_of(write([{"text": "one two three"}], tmp_path / "t.jsonl"), tokenizer, context=2, kind="masked")


# ---- chats and pairs ---------------------------------------------------------------------------------------------------------
LAYOUTS: list[dict[str, Any]] = [
    {"messages": say("sum?", "five")},
    {"conversations": [{"from": "human", "value": "sum?"}, {"from": "gpt", "value": "five"}]},
    {"instruction": "sum?", "input": "", "output": "five"},
    {"prompt": "sum?", "completion": "five"},
    {"prompt": say("sum?"), "completion": [{"role": "assistant", "content": "five"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "sum?"}]}, {"role": "assistant", "content": "five"}]},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layouts_give_the_same_rows(family: str, tmp_path: Path) -> None:
    tokenizer, found = tokenizer_of("metaspace first", family), []
    for i, row in enumerate(LAYOUTS):
        rows = rows_of(write([row], tmp_path / f"{i}.jsonl"), tokenizer, context=256)
        found.append((rows[0]["input_ids"].tolist(), rows[0]["labels"].tolist(), rows.stops))
    assert all(f == found[0] for f in found)
    assert found[0][0] == tokenizer.apply_chat_template(say("sum?", "five"), return_dict=False)
    memory = tokenize([say("sum?", "five")], tokenizer, 2000, 256)
    assert (memory.ids[0].tolist(), memory.labels[0].tolist(), memory.stops) == found[0]


def test_pairs_without_a_template_learn_the_completion_and_the_end(tmp_path: Path, tokenizer: Any) -> None:
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    row = rows_of(write([{"prompt": "sum of ", "completion": "five"}], tmp_path / "t.jsonl"), plain)[0]
    ids = [*plain("sum of five", add_special_tokens=False)["input_ids"], plain.eos_token_id]
    assert row["input_ids"].tolist() == ids
    assert plain.decode(row["labels"][row["labels"] != IGNORE]) == " five" + plain.eos_token  # the space belongs to the token
    with pytest.raises(UserError, match="no chat template.*data.chat_template"):
        rows_of(write([GOOD], tmp_path / "u.jsonl"), plain)


def test_packed_chats_are_whole_and_learn_what_they_learn_alone(tmp_path: Path, tokenizer: Any) -> None:
    chats = [{"messages": say("two?", "yes " * (i % 5 + 1))} for i in range(20)]
    data = write(chats, tmp_path / "t.jsonl")
    alone, packed = rows_of(data, tokenizer, context=128), rows_of(data, tokenizer, context=128, packing=True)
    seen: dict[int, tuple[list[int], list[int]]] = {}
    for i in range(len(packed)):
        row = packed[i]
        assert len(row["input_ids"]) <= 128
        for d in row["segments"].unique().tolist():
            at = row["segments"] == d
            assert d not in seen
            seen[d] = (row["input_ids"][at].tolist(), row["labels"][at].tolist())
    assert len(packed) < len(alone) == 20 and packed.tokens == alone.tokens
    assert seen == {i: (alone[i]["input_ids"].tolist(), alone[i]["labels"].tolist()) for i in range(20)}


# ---- several sources ---------------------------------------------------------------------------------------------------------
def test_shares_of_sources_are_exact_to_one_row(tmp_path: Path) -> None:
    names, sizes, weights = "abc", (40, 7, 13), (1.0, 2.0, 0.5)
    parts = []
    for k, (name, n, w) in enumerate(zip(names, sizes, weights, strict=True)):
        write([{"input_ids": [100 * k + i % 50] * 8} for i in range(n)], tmp_path / f"{name}.jsonl")
        parts.append(Part(str(tmp_path / f"{name}.jsonl"), w))
    rows = rows_of(Data(sources=parts), None, context=8)
    total, drawn = sum(sizes), np.bincount([int(rows[i]["input_ids"][0]) // 100 for i in range(len(rows))], minlength=3)
    assert abs(len(rows) - total) <= 1
    assert all(abs(d - total * w / sum(weights)) <= 1 for d, w in zip(drawn, weights, strict=True))
    assert [f["drawn"] for f in rows.facts["sources"].values()] == drawn.tolist()
    again, other = rows_of(Data(sources=parts), None, context=8), rows_of(Data(sources=parts), None, context=8, seed=1)
    assert stream(again) == stream(rows) != stream(other)
    of_b = np.bincount([int(t) - 100 for t in (rows[i]["input_ids"][0] for i in range(len(rows))) if int(t) // 100 == 1])
    assert len(of_b) == 7 and of_b.max() - of_b.min() <= 1  # a source that runs out begins again
    first, rest = rows.split(20)
    assert len(first) == 20 and stream(first) + stream(rest) == stream(rows)


def test_weight_zero_leaves_a_source_out_and_all_zeros_are_refused(tmp_path: Path) -> None:
    for k, name in enumerate("ab"):
        write([{"input_ids": [100 * k] * 8}] * 4, tmp_path / f"{name}.jsonl")
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert set(stream(rows_of(Data(sources=[Part(a, 1.0), Part(b, 0.0)]), None, context=8))) == {0}
    with pytest.raises(UserError, match="weights of all sources are 0"):
        rows_of(Data(sources=[Part(a, 0.0), Part(b, 0.0)]), None)
    with pytest.raises(UserError, match="a path and sources"):
        rows_of(Data(a, sources=[Part(b)]), None)


def test_texts_and_packed_chats_in_one_batch_stay_apart(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    chats = write([GOOD] * 12, tmp_path / "c.jsonl")
    rows = rows_of(Data(sources=[Part(str(tmp_path / "t.txt")), Part(str(chats.path))]), tokenizer, context=64, packing=True)
    assert rows.packed
    for order in (range(len(rows)), reversed(range(len(rows)))):
        batch = collate([rows[i] for i in order])
        assert batch["segments"].shape == batch["input_ids"].shape == batch["position_ids"].shape
        assert ((batch["segments"] >= 0) == batch["real"]).all()


def test_stops_and_warnings_of_all_sources_are_told(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte level", "glm")
    a, b = (str(write([{"messages": say("two?", f"yes {n}", "so?", "no")}] * 2, tmp_path / f"{n}.jsonl").path) for n in "ab")
    rows = rows_of(Data(sources=[Part(a), Part(b)]), tokenizer)
    assert tokenizer.convert_ids_to_tokens(rows.stops) == ["<|user|>"] and rows.facts["answers without an end token"] == 4
