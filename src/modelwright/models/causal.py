"""What our mixtures of experts share: a head with a balance loss that is of each layer by itself, and the type of their weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from modelwright.moe.balance import counts_of, switch
from modelwright.moe.watch import padding


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all parameters this type and leave buffers alone, as loading a checkpoint does.

    `model.to(dtype)` would also round the frequencies of rotary embeddings, and in bf16 move logits by more than 0.5.
    """
    for p in model.parameters():
        p.data = p.data.to(dtype)


@dataclass
class Routed(MoeModelOutputWithPast):
    """With the experts that each router chose, (B T, k), where they are not those of its largest logits."""

    router_index: tuple[Tensor, ...] | None = None


class Balanced:
    """forward of a causal language model over `self.model`, which gives router_logits, one (B T, E) per sparse layer.

    With labels and output_router_logits the loss has router_aux_loss_coef times the mean over layers of the Switch loss,
    padding excluded (transformers pools the layers first; see modelwright.moe.balance).
    """

    @can_return_tuple
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
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, output_router_logits=wanted, return_dict=True, **kwargs)
        logits = self.lm_head(_kept(out.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self.loss_function(logits, labels, c.vocab_size)
        balance = None
        if wanted:
            real = padding(attention_mask, out.last_hidden_state.shape[1])
            chosen = out.get("router_index") or [x.topk(c.num_experts_per_tok).indices for x in out.router_logits]
            each = [_switch(x, i, None if real is None else real.flatten()) for x, i in zip(out.router_logits, chosen, strict=True)]
            balance = torch.stack(each).mean()
            loss = None if loss is None else loss + c.router_aux_loss_coef * balance
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits if wanted else None,
        )


def _kept(x: Tensor, keep: int | Tensor) -> Tensor:
    """The places of x (B, T, d) whose logits are wanted: the last n (0: all), places of all rows, or places or a mask of each row.

    transformers has slice_logits_to_keep for it since 5.20; vLLM 0.32 asks for 5.19 at most.
    """
    if isinstance(keep, int):
        return x[:, -keep:]
    if keep.dim() == 1:
        return x[:, keep]
    return x[keep] if keep.dtype == torch.bool else x.take_along_dim(keep[..., None], 1)


def _switch(logits: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
    return switch(logits.float().softmax(-1), counts_of(index, logits.shape[1], real), real=real)
