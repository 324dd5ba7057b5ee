"""The reward model: any decoder, where rewards and biases are read, folders that load, and the reward function made from one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import SEEDLING, Checkpoint
from modelwright.models.reward import HEADS, RewardFunction, RewardModel, reward_model, stock

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "opt", "phi3", "gemma2", "granite", "mixtral")


def scored(core: Any, **heads: Any) -> RewardModel:
    """A reward model whose heads are random."""
    model = reward_model(core, **heads).eval()
    draw = torch.Generator().manual_seed(3)
    for name in HEADS:
        if head := getattr(model, name, None):
            head.weight.data.copy_(torch.randn(head.weight.shape, generator=draw))
    return model


@pytest.fixture(scope="module")
def texts() -> tuple[Tensor, Tensor, Tensor]:
    """ids (3, 10), their mask, padded on the right, and the lengths of the prompts."""
    ids = torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(10) < torch.tensor([[10], [7], [9]])).long()
    return ids * mask, mask, torch.tensor([4, 2, 3])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_gives_the_same_reward_and_bias(family: str, texts: Any, tmp_path: Path) -> None:
    model = scored(model_of(family), bias=True, length_head=True)
    model.save_pretrained(tmp_path)
    saved = Checkpoint(tmp_path)
    Anatomy(saved.skeleton)
    before, after = model(*texts), saved.model().eval()(*texts)
    assert before.logits.shape == (3, 1)
    for name in ("logits", "rewards", "bias", "length_rewards", "length_bias"):
        assert torch.allclose(before[name], after[name], atol=1e-5), name
    assert torch.allclose(before.logits[:, 0], before.rewards - before.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_further_heads_the_stock_class_gives_the_same_rewards(family: str, texts: Any) -> None:
    model = scored(model_of(family))
    model.config.pad_token_id = 0
    plain = stock(model).eval()
    assert isinstance(plain, RewardModel) == (family == "granite")  # transformers has no such classifier
    assert torch.allclose(model(*texts[:2]).logits, plain(input_ids=texts[0], attention_mask=texts[1]).logits, atol=1e-5)


def test_bias_is_read_at_the_prompt_s_end_and_unchanged_by_any_edit_of_the_answer(texts: Any) -> None:
    model, (ids, mask, lengths) = scored(model_of("llama"), bias=True), texts
    bias, rewards = (model(*texts)[n] for n in ("bias", "rewards"))
    for k in range(3):
        other = torch.where(torch.arange(10) >= lengths[:, None], (ids * 7 + k + 5) % 80 + 3, ids)
        found = model(other, torch.ones_like(mask), lengths)
        assert torch.allclose(found.bias, bias, atol=1e-6)
        assert (found.rewards - rewards).abs().min() > 1e-3
    changed = ids.clone()
    changed[torch.arange(3), lengths - 1] += 1
    assert (model(changed, mask, lengths).bias - bias).abs().min() > 1e-3, "the prompt's last token counts"


def test_padding_on_the_left_moves_nothing(texts: Any) -> None:
    model, (ids, mask, lengths) = scored(model_of("llama"), bias=True), texts
    right = model(ids, mask, lengths)
    order = [torch.cat([torch.where(m == 0)[0], torch.where(m == 1)[0]]) for m in mask]
    left_ids, left_mask = (torch.stack([v[o] for v, o in zip(t, order, strict=True)]) for t in (ids, mask))
    places = (left_mask.cumsum(1) - 1).clamp(min=0)
    left = model(left_ids, left_mask, lengths, position_ids=places)
    assert torch.allclose(left.logits, right.logits, atol=1e-5) and torch.allclose(left.bias, right.bias, atol=1e-5)


def test_the_end_of_a_prompt_is_found_by_its_last_tokens_or_refused(texts: Any) -> None:
    model, (ids, mask, lengths) = scored(model_of("llama"), bias=True), texts
    with pytest.raises(ValueError, match="give prompt_lengths"):
        model(ids, mask)
    marked = ids.clone()
    for row, n in enumerate(lengths):
        marked[row, n - 2 : n] = torch.tensor([91, 92])
    model.config.prompt_end = [91, 92]
    assert torch.equal(model(marked, mask).bias, model(marked, mask, lengths).bias)
    with pytest.raises(ValueError, match="does not hold the tokens"):
        model(ids, mask)


@pytest.mark.parametrize(("family", "why"), [("bert", "both directions"), ("t5", "encoder-decoder")])
def test_what_is_no_decoder_is_refused(family: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        reward_model(model_of(family))


def test_advantages_within_a_group_do_not_change_by_a_bias_of_the_prompt() -> None:
    rewards, bias = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)

    def grpo(r: Tensor) -> Tensor:
        return (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)

    def rloo(r: Tensor) -> Tensor:
        return r - (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1)

    for advantages in (grpo, rloo):
        assert torch.allclose(advantages(rewards), advantages(rewards - bias), atol=1e-12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on the seedling, with its tokenizer."""
    folder, source = tmp_path_factory.mktemp("reward"), Checkpoint(SEEDLING)
    model = scored(source.model(torch.float32), bias=True)
    model.config.pad_token_id = source.tokenizer().eos_token_id
    model.save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_becomes_a_reward_function(saved: Path) -> None:
    reward = RewardFunction(saved, batch=2)
    prompts, completions = ["Say one.", "Say one.", "Count."], [" one", " two three", " 1 2 3"]
    found = reward(prompts=prompts, completions=completions)
    assert len(found) == 3 and reward.bias is not None
    assert reward.bias[0] == pytest.approx(float(reward.bias[1]), abs=1e-5) and abs(reward.bias[0] - reward.bias[2]) > 1e-4
    for prompt, completion, value in zip(prompts, completions, found, strict=True):
        ids, begin = reward.encode(prompt, completion)
        assert reward.tokenizer.decode(ids[begin:], skip_special_tokens=True) == completion
        [alone] = reward.score(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), torch.tensor([begin])).tolist()
        assert alone == pytest.approx(value, abs=1e-4), "batches do not change a reward"


def test_a_classifier_without_a_padding_token_is_read_at_each_text_s_end(tmp_path: Path) -> None:
    source = Checkpoint(SEEDLING)
    model = stock(scored(source.model(torch.float32)))
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    source.tokenizer().save_pretrained(tmp_path)
    reward = RewardFunction(tmp_path)
    assert reward.model.config.pad_token_id is None
    both = reward(prompts=["a", "a"], completions=[" b", " b c d e f g"])
    assert both == pytest.approx([reward(prompts=["a"], completions=[c])[0] for c in (" b", " b c d e f g")], abs=1e-5)


def test_a_long_prompt_loses_its_beginning_and_is_counted(saved: Path) -> None:
    reward = RewardFunction(saved)
    assert reward(prompts=["word " * 600], completions=[" yes"]) and reward.cut == 1


def test_group_relative_trainers_are_told_that_the_bias_cancels(saved: Path) -> None:
    with pytest.warns(UserWarning, match="cancels in the advantages of GRPO"):
        RewardFunction(saved)(prompts=["a"], completions=[" b"], log_metric=lambda *_: None)


def test_what_gives_no_reward_is_refused(saved: Path, tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(UserError, match="is no reward model"):
        RewardFunction(SEEDLING)
    import transformers

    two = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**{**Checkpoint(tiny("llama")).config, "num_labels": 2}))
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="with 2 labels"):
        RewardFunction(tmp_path / "two")
    with pytest.raises(UserError, match="num_labels 1"):
        reward_model(two)
    bad = RewardFunction(saved)
    bad.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="reward 0 is not finite"):
        bad(prompts=["a"], completions=[" b"])
