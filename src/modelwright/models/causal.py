"""The head that our mixtures of experts share: logits, and a balance loss that is of each layer by itself."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from modelwright.moe.balance import counts_of, switch


class Balanced:
    """forward of a causal language model over `self.model`, which gives router_logits, one (B T, E) per sparse layer.

    With labels and output_router_logits the loss has router_aux_loss_coef times the mean over layers of the Switch loss,
    padding excluded (transformers pools the layers first; see modelwright.moe.balance).
    """

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        c = self.config
        wanted = c.output_router_logits if output_router_logits is None else output_router_logits
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, output_router_logits=wanted, **kwargs)
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self.loss_function(logits, labels, c.vocab_size)
        balance = None
        if wanted:
            real = None if attention_mask is None else attention_mask.bool().flatten()
            balance = torch.stack([_switch(x, c.num_experts_per_tok, real) for x in out.router_logits]).mean()
            loss = None if loss is None else loss + c.router_aux_loss_coef * balance
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits if wanted else None,
        )


def _switch(logits: Tensor, k: int, real: Tensor | None) -> Tensor:
    probs = logits.float().softmax(-1)
    return switch(probs, counts_of(probs.topk(k).indices, probs.shape[1], real), real=real)
