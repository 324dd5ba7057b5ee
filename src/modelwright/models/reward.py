"""A reward model over any decoder, with a bias of the prompt beside the reward; and a reward function made from a saved folder.

    import modelwright.models                                        # registers the class "reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    out = model(input_ids, attention_mask, prompt_lengths)           # out.logits[:, 0] = out.rewards - out.bias

    reward = RewardFunction(folder)                                  # stock sequence classifiers too
    reward(prompts=["..."], completions=["..."])                     # a list of floats, as TRL's trainers call it

The reward r is a linear head on the state of the last token that is not padding, as in transformers' sequence classifiers. The bias C is a
second head on the state of the prompt's last token (`bias_at` "prompt_end"), so that nothing in the answer changes it, or on the state that
r is read from ("sequence_end"). `length_head` adds the heads of ODIN and LPBC that take up the length; they are left out of `logits`.
Where `prompt_lengths` are not given, the prompt's end is found by the tokens that end every prompt of the training data (`prompt_end`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from modelwright.core.data.encode import Encoder
from modelwright.core.data.make import render_chat
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import add_role
from modelwright.core.model.checkpoint import Checkpoint

_LABELS = ("model_type", "id2label", "label2id")
HEADS = ("score", "prompt_bias", "length_score", "length_bias")
add_role(r"^(prompt_bias|length_score|length_bias)", "head")


class RewardConfig(PreTrainedConfig):
    """The config of the decoder, and which heads stand on it."""

    model_type = "reward_model"
    sub_configs = {"text_config": AutoConfig}
    text_config: dict | PreTrainedConfig | None = None
    bias: bool = False
    bias_at: str = "prompt_end"
    length_head: bool = False
    prompt_end: list[int] | None = None
    pad_token_id: int | None = None
    num_labels: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            values = dict(self.text_config)
            self.text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        elif self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        super().__post_init__(**kwargs)


@dataclass
class RewardOutput(SequenceClassifierOutput):
    """logits (B, 1): r - C, what training with the reward uses. rewards (B,): r. bias (B,): C. All in fp32.

    token_rewards (B, T): r read at every token. length_rewards (B,), length_bias (B,), length_token_rewards (B, T): the length's heads.
    last (B,): the place of the token that r is read at.
    """

    rewards: Tensor | None = None
    bias: Tensor | None = None
    token_rewards: Tensor | None = None
    length_rewards: Tensor | None = None
    length_bias: Tensor | None = None
    length_token_rewards: Tensor | None = None
    last: Tensor | None = None


class RewardModel(PreTrainedModel):
    """A decoder without its language-model head, and the heads of the reward."""

    config: RewardConfig
    config_class = RewardConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: RewardConfig):
        super().__init__(config)
        self.model = AutoModel.from_config(config.text_config)
        width = self.model.get_input_embeddings().embedding_dim
        self.score = nn.Linear(width, 1, bias=False)
        if config.bias:
            self.prompt_bias = nn.Linear(width, 1, bias=False)
        if config.length_head:
            self.length_score = nn.Linear(width, 1, bias=False)
            if config.bias:
                self.length_bias = nn.Linear(width, 1, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt_lengths: Tensor | None = None, **kwargs: Any
    ) -> RewardOutput:
        """input_ids and attention_mask (B, T), padded on either side; prompt_lengths (B,) in tokens, padding not counted."""
        kwargs.pop("return_dict", None)
        pad = -1 if self.config.pad_token_id is None else self.config.pad_token_id
        seen = input_ids != pad if attention_mask is None else attention_mask.bool()
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state  # (B, T, d)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        # the rule of transformers' classifiers: where padding and the end of a text are one token, r is read before that end
        last = (places * (seen & (input_ids != pad))).argmax(1)
        at = last if self.config.bias_at == "sequence_end" or not self.config.bias else self._prompt_end(input_ids, seen, prompt_lengths)
        tokens = self._head(self.score, states)
        rewards = _read(tokens, last)
        out = RewardOutput(logits=rewards[:, None], rewards=rewards, token_rewards=tokens, last=last)  # type: ignore[arg-type]
        if self.config.bias:
            out["bias"] = _read(self._head(self.prompt_bias, states), at)
            out["logits"] = (rewards - out["bias"])[:, None]
        if self.config.length_head:
            out["length_token_rewards"] = self._head(self.length_score, states)
            out["length_rewards"] = _read(out["length_token_rewards"], last)
            if self.config.bias:
                out["length_bias"] = _read(self._head(self.length_bias, states), at)
        return out

    def _head(self, head: nn.Linear, states: Tensor) -> Tensor:
        """A head's values at every token (B, T), in fp32 whatever the decoder computes in."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), head.weight.float())[..., 0]

    def _prompt_end(self, ids: Tensor, seen: Tensor, lengths: Tensor | None) -> Tensor:
        """The place of the prompt's last token, (B,)."""
        if lengths is not None:
            return (seen.int().argmax(1) + lengths.to(ids.device) - 1).clamp(0, ids.shape[1] - 1)
        marker = self.config.prompt_end or []
        if not marker or len(marker) > ids.shape[1]:
            raise ValueError("the end of the prompt is unknown: give prompt_lengths (the prompts of the training data had no common end)")
        here = (ids.unfold(1, len(marker), 1) == torch.tensor(marker, device=ids.device)).all(2)  # (B, T - n + 1)
        if not bool(here.any(1).all()):
            raise ValueError("a row does not hold the tokens that end every prompt of the training data: give prompt_lengths")
        return (here * torch.arange(1, here.shape[1] + 1, device=ids.device)).argmax(1) + len(marker) - 1


def _read(values: Tensor, at: Tensor) -> Tensor:
    return values.gather(1, at[:, None])[:, 0]


AutoConfig.register("reward_model", RewardConfig)
AutoModelForSequenceClassification.register(RewardConfig, RewardModel)


# ---- from a decoder and back -------------------------------------------------------------------------------------------
def reward_model(core: Any, *, bias: bool = False, bias_at: str = "prompt_end", length_head: bool = False) -> RewardModel:
    """A reward model on the weights of a language model or of another reward model, without copying them; new heads are zero.

    UserError for a classifier of several labels and for a model whose states see what follows.
    """
    labels = core.config.num_labels
    if type(core).__name__.endswith("ForSequenceClassification") and labels != 1:
        raise UserError(f"{type(core).__name__} sorts texts into {labels} classes", "a reward model has num_labels 1", "give another")
    if core.config.is_encoder_decoder:
        raise UserError(f"{type(core).__name__} is an encoder-decoder", "a reward is read off a decoder", "give a decoder")
    backbone = core.base_model
    _require_causal(backbone, type(core).__name__)
    settings = {"bias": bias, "bias_at": bias_at, "length_head": length_head, "pad_token_id": core.config.pad_token_id}
    with torch.device("meta"):
        new = RewardModel(RewardConfig(text_config=backbone.config, architectures=[RewardModel.__name__], **settings))  # type: ignore[arg-type]
    new.model = backbone
    for name in HEADS:
        if head := getattr(new, name, None):
            old = getattr(core, name, None)
            kept = old.weight.data if isinstance(old, nn.Linear) and old.weight.shape == head.weight.shape else None
            zero = torch.zeros(head.weight.shape, dtype=backbone.dtype, device=backbone.device)
            head.weight = nn.Parameter(zero if kept is None else kept)
    new.config.dtype = backbone.dtype
    return new.train(core.training)


@torch.no_grad()
def _require_causal(backbone: Any, name: str) -> None:
    """UserError where the states of a text's beginning depend on what follows it."""
    training = backbone.training
    backbone.eval()
    ids = torch.arange(6, device=backbone.device)[None] % int(backbone.config.get_text_config().vocab_size)
    other = torch.cat([ids[:, :3], ids[:, 3:].flip(1)], 1)
    a, b = (backbone(input_ids=i).last_hidden_state[:, :3].float() for i in (ids, other))
    backbone.train(training)
    if not torch.allclose(a, b, atol=1e-2 * float(a.abs().max() + 1e-6)):
        raise UserError(f"{name} reads in both directions", "a reward is read off a decoder", "give a causal language model")


def stock(model: RewardModel) -> Any:
    """The same weights in transformers' own sequence classifier, where there is one and no other head; else the model itself."""
    text: Any = model.config.text_config
    cls: Any = AutoModelForSequenceClassification._model_mapping.get(type(text), None)
    if cls is None or model.config.bias or model.config.length_head:
        return model
    config = type(text)(**{k: v for k, v in text.to_dict().items() if k not in _LABELS} | {"num_labels": 1})
    config.architectures, config.pad_token_id, config.dtype = [cls.__name__], model.config.pad_token_id, model.config.dtype
    with torch.device("meta"):
        new = cls(config)
    score = getattr(new, "score", None)
    if not isinstance(score, nn.Linear) or score.weight.shape != model.score.weight.shape:
        return model
    setattr(new, new.base_model_prefix, model.model)
    new.score = model.score
    return new.train(model.training)


# ---- as a reward function ----------------------------------------------------------------------------------------------
class RewardFunction:
    """f(prompts=, completions=, **columns) -> list of float, from a saved reward model; texts or chats.

    A text is encoded as in training: prompt and completion together, with the tokenizer's end token. `score` takes ids. `bias` is C of
    the last call, None where the model has none. Texts longer than the model's positions lose the beginning of their prompt; `cut` counts
    them. Raises UserError for a model that is no reward model, and for a reward that is not finite.
    """

    def __init__(self, folder: str | Path, *, batch: int = 8, device: str | torch.device | None = None, dtype: torch.dtype | None = None):
        source = Checkpoint(folder)
        labels = getattr(source.hf_config, "num_labels", 2)
        if not type(source.skeleton).__name__.endswith(("ForSequenceClassification", "RewardModel")) or labels != 1:
            kind = type(source.skeleton).__name__
            raise UserError(f"{folder} is no reward model", f"it is a {kind} with {labels} labels", "give one that reward.train wrote")
        self.model = source.model(dtype).to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
        self.tokenizer, self.batch, self.cut = source.tokenizer(), batch, 0
        self.bias: Tensor | None = None
        text = source.hf_config.get_text_config()
        self.context = int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 0)
        self.__name__ = Path(folder).name  # TRL logs by this name
        self._encoder: Encoder | None = None
        self._warned = False

    @torch.no_grad()
    def score(self, ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None) -> Tensor:
        """Rewards (B,) in fp32 of ids (B, T), less the bias of their prompts where the model has one; no gradient."""
        calibrated = isinstance(self.model, RewardModel)
        no_padding = self.model.config.get_text_config().pad_token_id is None and not calibrated  # stock classes then read the last place
        parts, biases = [], []
        size = 1 if no_padding else self.batch
        for i in range(0, len(ids), size):
            rows = slice(i, i + size)
            inputs = {"input_ids": ids[rows], "attention_mask": attention_mask[rows]}
            if no_padding:
                inputs = {k: v[:, attention_mask[i].bool()] for k, v in inputs.items()}
            if calibrated and prompt_lengths is not None:
                inputs["prompt_lengths"] = prompt_lengths[rows]
            out = self.model(**{k: v.to(self.model.device) for k, v in inputs.items()}, use_cache=False)
            parts.append(out.logits[:, 0].float())
            if calibrated and out.bias is not None:
                biases.append(out.bias)
        rewards = torch.cat(parts)
        self.bias = torch.cat(biases) if biases else None
        if not bool(rewards.isfinite().all()):
            raise UserError(f"reward {int((~rewards.isfinite()).nonzero()[0])} is not finite", "the reward model gave NaN or infinity")
        return rewards

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        pairs = [self.encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        width = max(len(ids) for ids, _ in pairs)
        pad = self.model.config.pad_token_id or 0
        ids = torch.tensor([i + [pad] * (width - len(i)) for i, _ in pairs])
        mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in pairs])
        found = self.score(ids, mask, torch.tensor([n for _, n in pairs])).tolist()
        if self.bias is not None and "log_metric" in columns and not self._warned:  # what TRL's GRPO and RLOO hand to a reward
            import warnings

            warnings.warn(CANCELS, stacklevel=2)
            self._warned = True
        return found

    def encode(self, prompt: Any, completion: Any) -> tuple[list[int], int]:
        """Token ids of a prompt with its completion, and how many of them are the prompt's."""
        if not isinstance(prompt, str):
            answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            ids, learnt = render_chat(self.tokenizer, [*prompt, *answer])
            begin = len(learnt) - learnt[::-1].index(True) - 1
            while begin and learnt[begin - 1]:
                begin -= 1
        else:
            self._encoder = self._encoder or Encoder(self.tokenizer, "ranked")
            found = self.tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
            begin = sum(end <= len(prompt) for _, end in found["offset_mapping"]) + len(self._encoder.prefix)
            ids = [*self._encoder.prefix, *found["input_ids"], *([] if self._encoder.end is None else [self._encoder.end])]
        over = len(ids) - self.context if self.context else 0
        if over > 0:
            self.cut += 1
            ids, begin = ids[over:], max(1, begin - over)
        return ids, begin


CANCELS = (
    "the bias of the prompt cancels in the advantages of GRPO and RLOO and in pairs of one prompt (DPO): "
    "there only what it did to the training of the reward model has an effect"
)
