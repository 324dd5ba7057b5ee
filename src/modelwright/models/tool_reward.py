"""A language model that also gives a reward: it writes a trace about an answer, and a linear head reads the reward off the trace's end.

import modelwright.models                                        # registers the class "tool_reward_model"
model = AutoModelForSequenceClassification.from_pretrained(folder)
model(input_ids, attention_mask).logits[:, 0]                    # rewards of finished traces
model.model.generate(...)                                        # the language model inside
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from modelwright.core.model.anatomy import add_role
from modelwright.models.reward import RewardConfig

add_role(r"^model\.(lm_head|embed_out)", "head")


class ToolRewardConfig(RewardConfig):
    """The config of the language model, under `text_config`."""

    model_type = "tool_reward_model"


class ToolRewardModel(PreTrainedModel):
    """A language model and a head on its states."""

    config: ToolRewardConfig
    config_class = ToolRewardConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ToolRewardConfig):
        super().__init__(config)
        self.model = AutoModelForCausalLM.from_config(config.text_config)
        self.score = nn.Linear(self.model.get_input_embeddings().embedding_dim, 1, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, loss_of: Any = None, **kwargs: Any) -> Any:
        """Rewards of (B, T) texts. With `loss_of` (see core/train/head.py) instead the losses, their weighted sum, and rewards (B,)."""
        kwargs.pop("return_dict", None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if loss_of is None:
            return SequenceClassifierOutput(logits=self._rewards(self.model.base_model(**inputs)[0], input_ids, attention_mask)[:, None])
        labels, weights, states_of = loss_of
        seen: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return states_of(hidden)

        losses, total = self.model(**inputs, loss_of=(labels, weights, keep))
        return losses, total, self._rewards(seen[0], input_ids, attention_mask)

    def _rewards(self, states: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Read at the last token that the mask shows, in fp32; without a mask nothing is padding. That token may be the padding token
        too: it ends the trace."""
        real = torch.ones_like(ids) if mask is None else mask
        last = (torch.arange(ids.shape[1], device=ids.device) * real.bool()).argmax(1)
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states[torch.arange(len(ids), device=ids.device), last].float(), self.score.weight.float())[:, 0]


AutoConfig.register("tool_reward_model", ToolRewardConfig)
AutoModelForSequenceClassification.register(ToolRewardConfig, ToolRewardModel)


def tool_reward_model(core: Any, pad_token_id: int | None) -> ToolRewardModel:
    """The language model with a head of zeros, without copying its weights."""
    with torch.device("meta"):
        settings = {"text_config": core.config, "pad_token_id": pad_token_id, "architectures": [ToolRewardModel.__name__]}
        new = ToolRewardModel(ToolRewardConfig(**settings))  # type: ignore[arg-type]
    new.model = core
    new.score.weight = nn.Parameter(torch.zeros(new.score.weight.shape, dtype=core.dtype, device=core.device))
    new.config.dtype = core.dtype
    return new.train(core.training)
