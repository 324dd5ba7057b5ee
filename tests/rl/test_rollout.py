"""Roll-outs: draws that hang on the seed alone, prompts out of any data, rewards that are checked, a critic in fp32."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from families import _GQA, model_of
from modelwright.core.data.read import Chat, Ids, Pair, Preference, Text
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.models.reward import RewardFunction
from modelwright.models.reward import reward_model as calibrated
from modelwright.rl.rollout import examples
from modelwright.rl.rollout import reward as rewards
from modelwright.rl.rollout.critic import Critic, own_model, undropped
from modelwright.rl.rollout.prompts import Prompts
from modelwright.rl.rollout.reward import Reward
from modelwright.rl.rollout.sample import Sampling, draw, lengths, responses, uniforms
from modelwright.runner import recipe

SEEDLING = Path(rewards.__file__).parents[2] / "data" / "seedling"
PROMPTS = [torch.tensor(p) for p in ([5], [7, 8, 9, 10], [11, 12], [20, 21, 22], [5])]
KEYS = [(0, 3, i) for i in range(len(PROMPTS))]


# ---- samples ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt"])
def test_a_response_does_not_depend_on_its_batch(kind: str) -> None:
    model, how = model_of(kind), Sampling(9, 0.8, 50, (2,))
    alone = [responses(model, [p], [k], how, 1)[0].tolist() for p, k in zip(PROMPTS, KEYS, strict=True)]
    for size in (2, 64):
        assert [r.tolist() for r in responses(model, PROMPTS, KEYS, how, size)] == alone
    assert alone[0] != alone[4]  # the same prompt, another key


def test_tokens_are_those_of_plain_sampling_by_the_same_numbers() -> None:
    model, how = model_of("llama"), Sampling(6, 0.7, 10, ())
    made = responses(model, PROMPTS[1:2], KEYS[1:2], how, 1)[0]
    ids, numbers = PROMPTS[1], uniforms(KEYS[1:2], 6)[0]
    for i in range(6):
        with torch.no_grad():
            logits = model(ids[None]).logits[0, -1].double() / 0.7
        best = logits.topk(10)
        chances = best.values.softmax(0)
        place = next(k for k in range(10) if float(chances[: k + 1].sum()) > float(numbers[i]))
        assert int(made[i]) == int(best.indices[place])
        ids = torch.cat([ids, made[i : i + 1]])


def test_draws_have_the_right_chances() -> None:
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)) * 2
    numbers = torch.rand(40_000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for top_k in (0, 3):
        kept = logits if not top_k else torch.where(logits >= logits.topk(top_k).values[:, -1:], logits, -torch.inf)
        shares = torch.bincount(draw(logits.expand(40_000, -1), numbers, 0.5, top_k)[:, 0], minlength=6) / 40_000
        assert torch.allclose(shares, (kept / 0.5).softmax(1)[0], atol=0.01)
    edge = torch.tensor([[1.0 - 2**-53]], dtype=torch.float64)
    assert int(draw(torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]), edge, 1.0, 0)) == 2
    assert int(draw(logits, edge, 0.0, 0)) == int(logits.argmax())


def test_a_response_ends_with_the_first_end_token() -> None:
    made = torch.tensor([[5, 2, 2, 7], [5, 6, 7, 8], [3, 9, 9, 9]])
    assert lengths(made, (2, 3)).tolist() == [2, 4, 1]
    assert lengths(made, ()).tolist() == [4, 4, 4]
    every = responses(model_of("llama"), PROMPTS[:2], KEYS[:2], Sampling(9, 1.0, 0, tuple(range(96))), 8)
    assert [len(r) for r in every] == [1, 1]


# ---- prompts ---------------------------------------------------------------------------------------------------------
def test_prompts_are_what_stands_before_the_answer() -> None:
    tokenizer = Checkpoint(SEEDLING).tokenizer()
    tokenizer.chat_template = None
    plain = Prompts(tokenizer, 100)
    assert tokenizer.decode(plain.ids(Text("a b"))) == tokenizer.decode(plain.ids(Pair("a b", " c"))) == "a b"
    assert plain.ids(Ids([4, 5])) == [4, 5]
    talk = "\n\nHuman: hi\n\nAssistant:"
    assert tokenizer.decode(plain.ids(Preference(None, talk + " yes", talk + " no"))) == talk
    with pytest.raises(UserError, match="no chat template"):
        plain.ids(Chat([{"role": "user", "content": "a"}]))
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    asked = [{"role": "user", "content": "a"}]
    answer = [{"role": "assistant", "content": "b"}]
    for document in (Text("a"), Pair("a", "b"), Chat([*asked, *answer]), Preference(asked, answer, answer), Preference("a", "b", "c")):
        assert tokenizer.decode(plain.ids(document)) == "[user]a[assistant]"
    assert tokenizer.decode(plain.ids(Preference(None, [*asked, *answer], [*asked, *answer]))) == "[user]a[assistant]"
    assert tokenizer.decode(plain.ids(Preference(None, talk + " yes", talk + " no"))) == talk


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"input_ids": list(range(3, 3 + n))}) + "\n" for n in (2, 9, 4)))
    rows = Prompts(None, 5).rows(Data(path=str(file)), 96)
    assert [int(rows[i]["length"]) for i in range(len(rows))] == [2, 4]
    assert rows.facts["left out: longer than prompt_tokens"] == 1 and rows.facts["prompts"] == 3
    with pytest.raises(UserError, match="leaves no prompt"):
        Prompts(None, 1).rows(Data(path=str(file)), 96)
    with pytest.raises(UserError, match="out of range"):
        Prompts(None, 9).rows(Data(path=str(file)), 10)
    with pytest.raises(UserError, match="no prompts"):
        Prompts(None, 9).rows(Data(), 10)


# ---- rewards ---------------------------------------------------------------------------------------------------------
def reward_model(folder: Path, kind: str = "llama", labels: int = 1, seed: int = 3, **changes: Any) -> Path:
    torch.manual_seed(seed)
    config, model = {
        "llama": (T.LlamaConfig, T.LlamaForSequenceClassification),
        "gpt2": (T.GPT2Config, T.GPT2ForSequenceClassification),
    }[kind]
    small = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if kind == "gpt2" else _GQA
    made = model(config(**{**small, "num_labels": labels, **changes}))
    with torch.no_grad():
        made.score.weight.normal_()
    made.save_pretrained(folder)
    return folder


def named(monkeypatch: pytest.MonkeyPatch, **members: Any) -> None:
    module = types.ModuleType("my_rewards")
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, "my_rewards", module)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad", [0, 2, None])
def test_a_reward_model_reads_the_last_token_whatever_the_padding(kind: str, pad: int | None, tmp_path: Path) -> None:
    """Texts stand beside shorter ones; where padding and end token are one, the token before it is read, as in training."""
    made = Reward(str(reward_model(tmp_path / "r", kind, pad_token_id=pad)), None, None)
    made.load(torch.float32)
    answers = [torch.tensor(a) for a in ([3, 2], [4, 5, 6, 0], [2], [9, 8, 7, 2], [1, 1, 1])]
    found = made(PROMPTS, answers, 3)
    for p, a, score in zip(PROMPTS, answers, found, strict=True):
        ids = torch.cat([p, a])[None]
        with torch.no_grad():
            tokens = made.model.score(made.model.base_model(ids)[0])[0, :, 0]
        last = max(i for i in range(ids.shape[1]) if int(ids[0, i]) != pad)
        assert float(tokens[last]) == pytest.approx(float(score), abs=1e-5)
        assert float(made.model(ids).logits[0, 0]) == pytest.approx(float(score), abs=1e-5)
    assert made.model.config.pad_token_id == pad


def test_a_calibrated_reward_model_loses_the_bias_of_its_prompts(tmp_path: Path) -> None:
    model = calibrated(model_of("llama"), bias=True)
    with torch.no_grad():
        model.score.weight.normal_()
        model.prompt_bias.weight.normal_()
    model.save_pretrained(tmp_path / "r")
    made = Reward(str(tmp_path / "r"), None, None)
    made.load(torch.float32)
    answers = [torch.tensor([7, 8, 9]), torch.tensor([9])]
    found = made(PROMPTS[1:3], answers, 2)
    for p, a, score in zip(PROMPTS[1:3], answers, found, strict=True):
        with torch.no_grad():
            out = model(torch.cat([p, a])[None], prompt_lengths=torch.tensor([len(p)]))
        assert float(out.rewards - out.bias) == pytest.approx(float(score), abs=1e-5) and abs(float(out.bias)) > 1e-3


def test_a_reward_model_with_other_tokens_reads_the_text(tmp_path: Path) -> None:
    tokenizer, other = (Checkpoint(SEEDLING).tokenizer() for _ in range(2))
    folder = reward_model(tmp_path / "r", vocab_size=2100)
    other.add_tokens(["zzz"])
    other.save_pretrained(folder)
    made = Reward(str(folder), None, tokenizer)
    made.load(torch.float32)
    assert not made.same_tokens
    found = made(*([torch.tensor(tokenizer(t)["input_ids"]) for t in ts] for ts in (["ab", "c"], ["def", "gh"])), 2)
    assert found.tolist() == pytest.approx(RewardFunction(folder)(["ab", "c"], ["def", "gh"]), abs=1e-5)


def test_a_function_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = Checkpoint(SEEDLING).tokenizer()
    seen: dict[str, Any] = {}

    def everything(**given: Any) -> list[float]:
        seen.update(given)
        return [1.0] * len(given["completions"])

    class Calibrated:
        """As the project's wrapper of a calibrated reward: an object that is called with keywords."""

        def __call__(self, *, completions: list[str], **columns: Any) -> list[float]:
            return [len(c) - 0.5 for c in completions]

    named(monkeypatch, everything=everything, short=lambda completions: [len(c) for c in completions], calibrated=Calibrated())
    prompts, answers = ([torch.tensor(tokenizer(t)["input_ids"]) for t in ts] for ts in (["ab", "c"], ["def", "gh"]))
    assert Reward(None, "my_rewards:everything", tokenizer)(prompts, answers, 2).tolist() == [1, 1]
    assert seen == {"prompts": ["ab", "c"], "completions": ["def", "gh"], "completion_ids": [a.tolist() for a in answers]}
    assert Reward(None, "my_rewards:short", tokenizer)(prompts, answers, 2).tolist() == [3, 2]
    assert Reward(None, "my_rewards:calibrated", tokenizer)(prompts, answers, 2).tolist() == [2.5, 1.5]
    file = tmp_path / "own.py"
    file.write_text("def worth(completion_ids):\n    return [len(i) for i in completion_ids]\n")
    assert Reward(None, f"{file}:worth", None)(prompts, answers, 2).tolist() == [float(len(a)) for a in answers]


def test_a_model_object_is_a_reward_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "r")
    named(monkeypatch, model=Checkpoint(folder).model(torch.float32))
    whole = Reward(str(folder), None, None)
    whole.load(torch.float32)
    assert torch.equal(Reward(None, "my_rewards:model", None)(PROMPTS, PROMPTS, 8), whole(PROMPTS, PROMPTS, 8))


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (lambda completions: [float("nan")] * len(completions), "is not finite, because response 0"),
        (lambda completions: [1.0], "gave 1 values, because it was asked about 5"),
        (lambda completions: ["good"] * len(completions), "no number"),
        (lambda completions: [None] * len(completions), "no number"),
        (lambda completions: 1 / 0, "ZeroDivisionError"),
        (lambda: [1.0], "failed|gave"),
    ],
)
def test_a_reward_that_is_none_is_one_sentence(member: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, f=member)
    with pytest.raises(UserError, match=words):
        Reward(None, "my_rewards:f", None)(PROMPTS, PROMPTS, 8)


def test_what_is_no_reward_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named(monkeypatch, number=3)
    for folder, name, words in (
        (None, None, "neither"),
        ("a", "b:c", "both"),
        (None, "my_rewards.f", "names no function"),
        (None, "my_rewards:g", "cannot be imported"),
        (None, "no_such_module:g", "cannot be imported"),
        (None, "no_such_file.py:g", "cannot be imported"),
        (None, "my_rewards:number", "is no function"),
        (str(reward_model(tmp_path / "two", labels=2)), None, "2 classes"),
        (str(SEEDLING), None, "is no reward model"),
    ):
        with pytest.raises(UserError, match=words):
            Reward(folder, name, None)


# ---- the critic ------------------------------------------------------------------------------------------------------
def test_a_critic_from_a_reward_model_begins_with_its_scores(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "r")
    critic, judge = own_model(None, str(folder), torch.float32), Reward(str(folder), None, None)
    judge.load(torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    values = critic(ids, torch.ones_like(ids))
    assert values.shape == (1, 4) and values.dtype == torch.float32
    assert float(values[0, -1].detach()) == pytest.approx(float(judge([ids[0, :2]], [ids[0, 2:]], 1)), abs=1e-5)


def test_a_critic_of_bf16_weights_is_held_and_computed_in_fp32() -> None:
    critic = own_model(model_of("llama", dtype="bfloat16"), None, torch.bfloat16)
    assert {p.dtype for p in critic.parameters()} == {torch.float32} and all(p.requires_grad for p in critic.parameters())
    ids = torch.tensor([[5, 6, 7]])
    assert not bool(critic(ids, torch.ones_like(ids)).any())  # without a reward model it begins at 0
    head = Critic(None, 32)
    assert head(ids, ids, torch.ones(1, 3, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_dropout_is_switched_off_everywhere() -> None:
    for kind in ("gpt2", "llama", "opt"):
        model = model_of(kind, **({"attention_dropout": 0.5} if kind == "llama" else {}))
        undropped(model)
        model.train()
        ids = torch.arange(3, 13)[None]
        assert torch.equal(model(ids).logits, model(ids).logits)


# ---- the examples ----------------------------------------------------------------------------------------------------
def test_the_data_of_the_alignment_recipes_prefers_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples.write(tmp_path / "align", 20)
    pairs = [json.loads(line) for line in (tmp_path / "align" / "pairs.jsonl").read_text().splitlines()]
    prompts = [p["prompt"] for p in pairs]
    assert examples.again(prompts, [p["chosen"] for p in pairs]) == [1.0] * 20
    assert examples.again(prompts, [p["rejected"] for p in pairs]) == [-2.0] * 20
    assert examples.again(["Say a b:"], [" a"]) == [0.5]
    monkeypatch.chdir(tmp_path)
    for name in ("align", "align-dpo"):
        recipe.check(recipe.read(name))
    assert [s.entry.name for s in recipe.read("align").steps] == ["tune.full", "reward.train", "rl.ppo"]
