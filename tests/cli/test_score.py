"""eval: bits per byte as while tuning, exact accuracies, tasks with choices, and the door to lm-eval."""

import json
import math
import sys
import types
from pathlib import Path

import pytest

from modelwright.cli import app as cli

TEXT = "import os\nimport re\n\n\ndef read(self, size=-1):\n    return self.buffer\n" * 12


def _call(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in argv])
    return int(caught.value.code or 0)


def _results(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    assert _call("eval", "--base", "seedling", *argv, "--json") == 0
    return json.loads(capsys.readouterr().out)["results"]


def test_bits_per_byte_and_accuracy_are_those_of_the_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from modelwright.core.model.checkpoint import Checkpoint

    (tmp_path / "t.txt").write_text(TEXT)
    for batch in (1, 8):
        (row,) = _results(capsys, tmp_path / "t.txt", "--context", 64, "--batch", batch).values()
        source = Checkpoint("seedling")
        tokenizer, model = source.tokenizer(), source.model()
        ids = torch.tensor([*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id])
        loss, right, count = 0.0, 0, 0
        with torch.no_grad():
            for part in ids.split(64):
                if len(part) > 1:
                    logits = model(part[None]).logits[0, :-1]
                    loss += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
                    right, count = right + int((logits.argmax(-1) == part[1:]).sum()), count + len(part) - 1
        assert row["tokens"] == count and row["token_accuracy"] == right / count
        assert row["loss"] == pytest.approx(loss / count, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(loss / count / math.log(2) * len(ids) / len(TEXT), rel=1e-5)


def _task(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_the_likelier_choice_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "import os\nimport re\nimport", "choices": ["sys", "qqzzj"], "answer": 0},
        {"prompt": "def read(self, size=-1):\n   ", "choices": ["77,77", "return self"], "answer": "return self"},
    ]
    (row,) = _results(capsys, _task(tmp_path / "t.jsonl", *rows)).values()
    assert row["accuracy"] == row["accuracy_per_byte"] == 1 and row["items"] == 2
    assert row["interval"][0] > 0.3 and row["interval"][1] == 1
    (row,) = _results(capsys, _task(tmp_path / "u.jsonl", *({**r, "answer": 1 - i} for i, r in enumerate(rows)))).values()
    assert row["accuracy"] == 0
    (row,) = _results(capsys, tmp_path / "t.jsonl", "--limit", 1).values()
    assert row["items"] == 1


def test_a_likelihood_is_the_sum_over_the_choice_alone() -> None:
    import torch

    from modelwright.cli.score import _likelihood
    from modelwright.core.model.checkpoint import Checkpoint

    source = Checkpoint("seedling")
    tokenizer, model = source.tokenizer(), source.model()
    head, whole = tokenizer("import")["input_ids"], tokenizer("import os")["input_ids"]
    assert whole[: len(head)] == head
    with torch.no_grad():
        logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = sum(float(logp[i - 1, whole[i]]) for i in range(len(head), len(whole)))
        got, cut = _likelihood(model, tokenizer, "import", "os", 512)
        assert got == pytest.approx(expected, abs=1e-4) and not cut
        long, cut = _likelihood(model, tokenizer, "import os\n" * 400 + "import", "os", 512)
    assert cut and math.isfinite(long)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "choices": ["a"], "answer": 0}, "item 0"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "item 0"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, "item 0"),
        ({"prompt": "x", "choices": ["a", ""], "answer": 0}, "item 0"),
        ({"prompt": 3, "choices": ["a", "b"], "answer": 0}, "item 0"),
        ({"prompt": "x", "choices": "ab", "answer": 0}, "item 0"),
    ],
)
def test_an_item_that_is_no_question_is_one_sentence(row: dict, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("eval", "--base", "seedling", _task(tmp_path / "t.jsonl", row)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "nothing to measure"),
        (["none.txt"], "none.txt"),
        (["--shots", "2"], "nothing to measure"),
        (["TEXT", "--shots", "2"], "--shots has no use"),
        (["TEXT", "--context", "1000"], "512 positions"),
        (["TEXT", "--base", "./none"], "none"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    assert _call("eval", "--base", "seedling", *(str(tmp_path / "t.txt") if a == "TEXT" else a for a in argv)) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out


def test_tasks_are_run_by_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {}

    class HFLM:
        def __init__(self, **given: object) -> None:
            asked.update(given)

    def simple_evaluate(**given: object) -> dict:
        asked.update(given)
        if "nothing" in given["tasks"]:
            raise KeyError("nothing")
        return {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.01}}}

    outer, inner = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models.huggingface")
    outer.simple_evaluate, inner.HFLM = simple_evaluate, HFLM
    for name, module in (("lm_eval", outer), ("lm_eval.models", types.ModuleType("m")), ("lm_eval.models.huggingface", inner)):
        monkeypatch.setitem(sys.modules, name, module)
    assert _results(capsys, "--tasks", "arc_easy, piqa", "--shots", 2, "--limit", 5) == {"arc_easy": {"acc": 0.25, "acc_stderr": 0.01}}
    assert asked["tasks"] == ["arc_easy", "piqa"] and asked["num_fewshot"] == 2 and asked["limit"] == 5 and asked["batch_size"] == 8
    assert type(asked["pretrained"]).__name__ == "LlamaForCausalLM"
    assert _call("eval", "--base", "seedling", "--tasks", "nothing") == 2
    assert "lm-eval cannot run nothing" in capsys.readouterr().err


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert _call("eval", "--base", "seedling", "--tasks", "arc_easy") == 2
    assert "pip install 'modelwright[eval]'" in capsys.readouterr().err
