"""The made tasks have one right answer each, and the score is exact."""

import pytest
import torch

from families import model_of
from modelwright.cache.engine.suite import TASKS, Items, make, solve
from modelwright.cache.evictors.nacl import NACL
from modelwright.core.errors import UserError

SYMBOLS = torch.arange(4, 96)


@pytest.mark.parametrize("task", TASKS)
def test_items_are_seeded_and_hold_their_answer_once(task: str) -> None:
    items, again = (make(task, 6, 60, SYMBOLS, seed=3, questions=2) for _ in range(2))
    assert torch.equal(items.rows()[0], again.rows()[0])
    assert not torch.equal(items.context, make(task, 6, 60, SYMBOLS, seed=4).context)
    assert make(task, 6, 60, SYMBOLS, seed=10**20).context.shape == items.context.shape
    assert items.context.shape[1] + items.questions.shape[2] <= 60
    ids, answers = items.rows()
    assert ids.shape[1] == len(answers) and int(answers.sum()) == 2 * items.answers.shape[2]
    for row in range(6):
        context = items.context[row].tolist()
        for question, answer in zip(items.questions[row].tolist(), items.answers[row].tolist(), strict=True):
            if task == "copy":
                assert context[: len(answer)] == answer
                continue
            cue = question[-1:] if task == "recall" else question
            found = [i for i in range(len(context)) if context[i : i + len(cue)] == cue]
            assert len(found) == 1
            assert context[found[0] + len(cue) :][: len(answer)] == answer


def test_the_passkey_lies_anywhere() -> None:
    context = make("passkey", 400, 60, SYMBOLS).context
    at = (context == SYMBOLS[0]).float().argmax(1)
    assert int((context == SYMBOLS[0]).sum()) == 400 and at.min() < 5 and at.max() > 48 and abs(float(at.float().mean()) - 27) < 3


@pytest.mark.parametrize("after", [False, True])
def test_solving_counts_whole_answers_only(after: bool) -> None:
    model = model_of("llama", max_position_embeddings=128)
    items = make("retrieval", 5, 50, SYMBOLS)
    ids = torch.cat([items.context, items.questions[:, 0]], 1)
    with torch.no_grad():
        said = model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)[:, ids.shape[1] :]
    said[3, 1] += 1
    assert solve(model, Items(items.context, items.questions, said[:, None]), after=after).tolist() == [True, True, True, False, True]
    assert solve(model, Items(items.context, items.questions, said[:, None]), NACL(keep=1.0), after=after, batch=2).sum() == 4


@pytest.mark.parametrize(("task", "length", "symbols"), [("recal", 60, 92), ("recall", 60, 10), ("copy", 14, 92), ("retrieval", 11, 92)])
def test_what_makes_no_task_is_refused(task: str, length: int, symbols: int) -> None:
    with pytest.raises(UserError, match="unknown task|does not fit"):
        make(task, 2, length, SYMBOLS[:symbols])
