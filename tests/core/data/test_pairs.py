"""Ranked pairs: where the prompt ends, what is left out and counted, what a row and a batch hold."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modelwright.core.data.encode import shared_prompt
from modelwright.core.data.make import make_rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.checkpoint import SEEDLING, Checkpoint
from modelwright.core.train.objective import pairs_together

CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Checkpoint(SEEDLING).tokenizer()


def rows_of(pairs: list[dict[str, Any]], tokenizer: Any, folder: Path, context: int = 64, **data: Any) -> Any:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return make_rows(Data(path=str(file), **data), tokenizer, len(tokenizer), context, kind="ranked")


def test_a_row_holds_both_answers_behind_their_prompt(tokenizer: Any, tmp_path: Path) -> None:
    [row] = rows_of([{"prompt": "How are you?", "chosen": " Fine.", "rejected": " Go away."}], tokenizer, tmp_path)
    for name, answer in (("chosen", " Fine."), ("rejected", " Go away.")):
        ids, begin = row[name].tolist(), row[f"{name}_from"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "How are you?" + answer
        assert tokenizer.decode(ids[begin:], skip_special_tokens=True) == answer
        assert ids[-1] == tokenizer.eos_token_id
    batch = pairs_together([row, {"length": torch.tensor(0), "example_id": -1}])  # one that fills up a batch counts for nothing
    assert batch["labels"][1].tolist() == [-100, -100] and not batch["real"][[1, 3]].any()
    batch = pairs_together([row, row])
    assert batch["input_ids"].shape[0] == 4 and batch["labels"].shape == (2, 2)
    assert int(batch["answer"][0].sum()) == len(row["chosen"]) - row["chosen_from"]


def test_equal_and_long_pairs_are_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    rows = rows_of(
        [good, {**good, "rejected": " b"}, {**good, "chosen": " b" * 100}, {**good, "chosen": ""}], tokenizer, tmp_path, context=16
    )
    assert len(rows) == 1
    assert rows.facts["left out: chosen and rejected are equal"] == 1
    assert rows.facts["left out: longer than the context"] == 1
    assert rows.facts["rows without text"] == 1


def test_conversations_that_differ_before_the_last_answer_are_refused_by_row(tokenizer: Any, tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": "yes"}]
    good = {"prompt": CHAT, "chosen": said, "rejected": [{"role": "assistant", "content": "no"}]}
    other = {"chosen": [*CHAT, *said], "rejected": [{"role": "user", "content": "Bye"}, *said]}
    with pytest.raises(UserError, match=r"row 2 .*differ before the last answer"):
        rows_of([good, other], tokenizer, tmp_path, chat_template="chatml")
    rows = rows_of([good, other], tokenizer, tmp_path, chat_template="chatml", refused="drop")
    assert len(rows) == 1 and rows.facts["rows refused"] == 1


def test_only_the_last_answer_of_a_conversation_is_marked(tokenizer: Any, tmp_path: Path) -> None:
    before = [*CHAT, {"role": "assistant", "content": "first"}, {"role": "user", "content": "and"}]
    pair = {n: [*before, {"role": "assistant", "content": w}] for n, w in (("chosen", "second"), ("rejected", "third"))}
    [row] = rows_of([pair], tokenizer, tmp_path, context=256, chat_template="chatml")
    assert "second" in tokenizer.decode(row["chosen"][row["chosen_from"] :]) and "first" in tokenizer.decode(row["chosen"])
    assert "first" not in tokenizer.decode(row["chosen"][row["chosen_from"] :])


def test_texts_are_no_pairs(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pairs of answers"):
        rows_of([{"text": "once"}], tokenizer, tmp_path)


def test_the_prompt_of_every_recorded_pair_ends_at_the_assistant(shared: Path) -> None:
    with gzip.open(shared / "hh_rlhf" / "harmless-base-test.jsonl.gz", "rt") as f:
        for line in f:
            pair = json.loads(line)
            at = shared_prompt(pair["chosen"], pair["rejected"])
            assert pair["chosen"][:at] == pair["rejected"][:at]
            assert pair["chosen"][:at].endswith("\n\nAssistant:")
