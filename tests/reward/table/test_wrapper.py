"""A calibrated reward in training: the same numbers as on recorded scores, for a function and for a model."""

import numpy as np
import pytest
import torch

from modelwright.core.errors import UserError
from modelwright.reward.calibrate import Calibrator
from modelwright.reward.table.wrapper import CalibratedFunction, CalibratedModel


def fitted(*features: str) -> Calibrator:
    rng = np.random.default_rng(0)
    found = {f: rng.integers(1, 40, 200).astype(float) for f in features}
    return Calibrator(features).fit(rng.normal(size=200) + sum(0.1 * v for v in found.values()), found)


def reward(prompts, completions, **columns) -> list[float | None]:
    return [None if c == "" else float(i) for i, c in enumerate(completions)]


def test_a_reward_function_is_corrected_and_none_stays_none() -> None:
    c = fitted("length")
    f = CalibratedFunction(reward, c)
    words = ["abc", "", "x" * 30]
    expected = c.apply(np.arange(3.0), {"length": np.array([3.0, 0.0, 30.0])})
    got = f(prompts=["p"] * 3, completions=words)
    assert got[1] is None and [got[0], got[2]] == pytest.approx([expected[0], expected[2]]) and f.__name__ == "calibrated_reward"


def test_features_come_from_functions_columns_tokens_and_chats() -> None:
    c = fitted("mine", "column", "tokens", "words")
    f = CalibratedFunction(lambda completions, **_: [1.0, 2.0], c, {"mine": lambda text: text.count("a")})
    chats = [[{"role": "assistant", "content": "a a b"}], [{"role": "assistant", "content": "b"}]]
    found = {"mine": [2, 0], "column": [7, 9], "tokens": [3, 1], "words": [3, 1]}
    expected = c.apply(np.array([1.0, 2.0]), {k: np.array(v, float) for k, v in found.items()})
    assert f(prompts=["p"] * 2, completions=chats, completion_ids=[[1, 2, 3], [4]], column=[7, 9]) == pytest.approx(expected.tolist())
    with pytest.raises(UserError, match="the feature 'column' is missing"):
        f(prompts=["p"] * 2, completions=chats, completion_ids=[[1, 2, 3], [4]])


def classifier() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=1, pad_token_id=0
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def test_a_reward_model_s_logits_are_less_the_bias_of_their_length() -> None:
    model, c = classifier(), fitted("tokens")
    wrapped = CalibratedModel(model, c)
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]])
    mask = (ids != 0).long()
    raw = model(input_ids=ids, attention_mask=mask).logits
    out = wrapped(input_ids=ids, attention_mask=mask)
    expected = c.apply(raw[:, 0].detach().numpy(), {"tokens": np.array([5.0, 2.0])})
    assert out.logits.shape == (2, 1) and out.logits.dtype == raw.dtype
    assert out.logits[:, 0].detach().numpy() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(wrapped(input_ids=ids).logits, out.logits), "without a mask, padding is not counted"
    assert wrapped.config.num_labels == 1 and wrapped.device == model.device, "what trainers ask of a reward model"


def test_the_bias_is_a_constant_for_the_gradient() -> None:
    model = classifier()
    ids = torch.tensor([[5, 6, 7], [8, 9, 5]])
    grads = []
    for m in (model, CalibratedModel(model, fitted("tokens"))):
        model.zero_grad()
        m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        grads.append(model.score.weight.grad.clone())
    assert torch.equal(*grads)


def test_what_cannot_be_wrapped_is_one_sentence() -> None:
    with pytest.raises(UserError, match="2 features, because a model sees the length only"):
        CalibratedModel(classifier(), fitted("length", "markdown"))
    with pytest.raises(UserError, match="not fitted"):
        CalibratedFunction(reward, Calibrator())
    with pytest.raises(UserError, match="the length of the sequences is unknown"):
        CalibratedModel(classifier(), fitted("tokens"))(inputs_embeds=torch.zeros(1, 3, 32))
