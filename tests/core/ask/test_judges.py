"""The judge protocol: kept answers, and a checkpoint as the judge."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from modelwright.core.ask.desk import Desk
from modelwright.core.ask.kept import Kept
from modelwright.core.ask.protocol import Answer, Prompt
from modelwright.core.errors import UserError


def prompts(*texts: str, **settings: object) -> list[Prompt]:
    return [Prompt((("user", t),), **settings) for t in texts]  # type: ignore[arg-type]


class Echo:
    """Says the prompt again; fails on what begins with '!'; stops for good after `until` answers."""

    def __init__(self, until: int = 1000) -> None:
        self.name, self.asked, self.until = "echo", [], until

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for i, p in enumerate(prompts):
            if len(self.asked) == self.until:
                raise KeyboardInterrupt
            text = p.messages[-1][1]
            self.asked.append(text)
            yield i, Answer(status="timeout") if text.startswith("!") else Answer(text.upper(), tokens_out=1, cost=0.5)


def test_the_same_prompt_is_asked_once_and_every_place_gets_its_answer() -> None:
    echo = Echo()
    desk = Desk(Kept(echo))
    assert [a.text for a in desk(prompts("x", "y", "x", "x"))] == ["X", "Y", "X", "X"] and echo.asked == ["x", "y"]
    assert [a.text for a in desk(prompts("y", "z"))] == ["Y", "Z"] and echo.asked == ["x", "y", "z"]
    assert desk.plain()["requests"] == 6 and desk.plain()["reused"] == 3 and desk.cost == 1.5 and desk.tokens_out == 3


def test_what_makes_a_request_another_one_is_part_of_its_key(tmp_path: Path) -> None:
    kept = Kept(Echo())
    other = Kept(None, name="another judge")
    (p,) = prompts("x")
    more = [*prompts("x", max_tokens=51), *prompts("x", temperature=1.0), *prompts("x", options=("a", "b")), *prompts("x", attempt=1)]
    assert len({kept.key(p), other.key(p), *map(kept.key, more)}) == 6


def test_a_stopped_run_is_taken_up_and_a_torn_line_is_survived(tmp_path: Path) -> None:
    file = tmp_path / "below" / "kept.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Desk(Kept(Echo(until=2), file))(prompts("a", "b", "c"))
    whole = file.read_text()
    file.write_text(whole[:-7])  # killed while it wrote the second
    kept = Kept(echo := Echo(), file)
    assert kept.torn == 1
    assert [a.text for a in Desk(kept)(prompts("a", "b", "c"))] == ["A", "B", "C"] and echo.asked == ["b", "c"]
    again = Kept(Echo(until=0), file)
    assert [a.text for a in Desk(again)(prompts("c", "b", "a"))] == ["C", "B", "A"] and again.torn == 1


@pytest.mark.parametrize(
    "change",
    [
        {"text": 5},
        {"text": None},
        {"status": "timeout"},
        {"status": 3},
        {"tokens_in": "7"},
        {"tokens_in": True},
        {"tokens_out": -1},
        {"cost": float("nan")},
        {"tokens_in": 10**400},
        {"probabilities": "ab"},
        {"probabilities": [0.5, "x"]},
        {"probabilities": [0.5, float("nan")]},
        {"probabilities": [0.2, 0.2]},
        {"probabilities": [1.0]},
        {"key": 3},
        {"more": 1},
    ],
    ids=str,
)
def test_a_kept_answer_of_another_type_is_counted_and_asked_again(change: dict, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    asked = prompts("a", "b", options=("x", "y"))
    Desk(Kept(Echo(), file))(asked)
    first, second = file.read_text().splitlines()
    file.write_text(json.dumps(json.loads(first) | change) + "\n" + second + "\n")
    desk = Desk(Kept(echo := Echo(), file))
    assert [a.text for a in desk(asked)] == ["A", "B"] and echo.asked == ["a"] and desk.plain()["kept_lines_not_read"] == 1


def test_a_kept_line_that_is_no_utf_8_is_not_half_read(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    Desk(Kept(Echo(), file))(prompts("ä", "b"))
    file.write_bytes(file.read_bytes().replace("Ä".encode(), b"\xff"))
    desk = Desk(Kept(echo := Echo(), file))
    assert [a.text for a in desk(prompts("ä", "b"))] == ["Ä", "B"] and echo.asked == ["ä"]


def test_what_an_earlier_run_paid_is_not_paid_again(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    first = Desk(Kept(Echo(), file))
    first(prompts("a"))
    again = Desk(Kept(Echo(until=0), file))
    again(prompts("a"))
    assert (first.cost, again.cost, again.reused) == (0.5, 0, 1)


def test_failures_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    assert [a.failed for a in Desk(Kept(Echo(), file))(prompts("!a", "b"))] == [True, False]
    echo = Echo()
    Desk(Kept(echo, file))(prompts("!a", "b"))
    assert echo.asked == ["!a"] and len(file.read_text().splitlines()) == 1


def test_recorded_answers_replay_without_a_judge(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    first = Desk(Kept(Echo(), file))(prompts("a", "b"))
    answers = Desk(Kept(None, file, name="echo"))(prompts("b", "a", "new"))
    assert [a.text for a in answers] == [first[1].text, first[0].text, ""] and answers[2].status == "not recorded"


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"input": "mine"}\n')
    with pytest.raises(UserError, match="holds no kept answers"):
        Kept(Echo(), file)
    assert json.loads(file.read_text()) == {"input": "mine"}
    with pytest.raises(UserError, match="is a folder"):
        Desk(Kept(Echo(), tmp_path))(prompts("a"))


def test_a_checkpoint_s_answers_do_not_depend_on_the_batch() -> None:
    from modelwright.core.ask.local import Local
    from modelwright.core.model.checkpoint import Checkpoint

    local = Local(Checkpoint("seedling"), batch=3)
    asked = prompts(
        "Import a module.", "x", "The quick brown fox jumps over the lazy dog. " * 4, max_tokens=6, options=("Output (a)", "Output (b)")
    )
    together = dict(local.ask(asked))
    for i, p in enumerate(asked):
        alone = dict(local.ask([p]))[0]
        assert alone.text == together[i].text and alone.probabilities == pytest.approx(together[i].probabilities, abs=1e-5)
        assert sum(alone.probabilities or ()) == pytest.approx(1) and alone.tokens_out == 6 and alone.status == "cut"


def test_probabilities_are_those_of_the_token_in_which_the_options_differ() -> None:
    import torch

    from modelwright.core.ask.local import Local
    from modelwright.core.model.checkpoint import Checkpoint

    source = Checkpoint("seedling")
    local, tokenizer = Local(source), source.tokenizer()
    (p,) = prompts("Which?", max_tokens=0, options=("Output (a)", "Output (b)"))
    ids = torch.tensor([tokenizer("Which?\n\n")["input_ids"] + tokenizer("Output (")["input_ids"]])
    a, b = (tokenizer(f"Output ({c})")["input_ids"] for c in "ab")
    at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    assert a[:at] == tokenizer("Output (")["input_ids"], "the tokenizer splits there"
    logits = local.model(ids).logits[0, -1, [a[at], b[at]]]
    assert dict(local.ask([p]))[0].probabilities == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
    assert dict(local.ask(prompts("x", max_tokens=0, options=("same", "same"))))[0].probabilities is None


def test_the_chat_template_is_used_and_one_without_a_system_role_gets_it_in_the_first_turn() -> None:
    from modelwright.core.ask.local import Local
    from modelwright.core.model.checkpoint import Checkpoint

    local = Local(Checkpoint("seedling"))
    turns = (("system", "Judge."), ("user", "One?"), ("assistant", "Yes"), ("user", "Two?"))
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    local.tokenizer.chat_template = plain
    assert local.tokenizer.decode(local._ids(turns)) == "<system>Judge.<user>One?<assistant>Yes<user>Two?<assistant>"
    local.tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + plain
    assert local.tokenizer.decode(local._ids(turns)) == "<user>Judge.\n\nOne?<assistant>Yes<user>Two?<assistant>"
    local.tokenizer.chat_template = None
    assert local.tokenizer.decode(local._ids(turns)) == "Judge.\n\nOne?\n\nYes\n\nTwo?\n\n"


def test_a_prompt_beyond_the_context_is_not_cut_but_fails() -> None:
    from modelwright.core.ask.local import Local
    from modelwright.core.model.checkpoint import Checkpoint

    answers = Desk(Local(Checkpoint("seedling")))(prompts("word " * 600, "short", max_tokens=2))
    assert [a.status for a in answers] == ["too long", "cut"]


def test_a_checkpoint_without_a_tokenizer_is_refused(tiny) -> None:
    from modelwright.core.ask.local import Local
    from modelwright.core.model.checkpoint import Checkpoint

    with pytest.raises(UserError, match="the judge has no tokenizer"):
        Local(Checkpoint(tiny("llama")))
