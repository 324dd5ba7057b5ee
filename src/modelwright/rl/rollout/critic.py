"""The critic: what a response is expected to be worth, before each of its tokens. Its head is held and computed in fp32.

It is a model of its own, begun from the reward model (as in the official code) or from the policy, or one linear layer on the policy's
states. It stands beside the policy, not in it: it has its own optimizer group and its own gradient clipping, and no method that tunes the
policy freezes or adapts it. With several processes each holds it whole.
"""

from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train import dist


class Critic(nn.Module):
    """Values of all positions. Without a trunk it reads the policy's states."""

    def __init__(self, trunk: Any, size: int, head: Tensor | None = None):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(size, 1)
        with torch.no_grad():  # without a reward model every value is 0 at first
            self.head.weight.zero_() if head is None else self.head.weight.copy_(head.float())
            self.head.bias.zero_()

    def forward(self, ids: Tensor, seen: Tensor, states: Tensor | None = None) -> Tensor:
        """Values (B, T) fp32: that of position t is seen after tokens 0..t."""
        if self.trunk is not None:
            states = self.trunk(input_ids=ids, attention_mask=seen, use_cache=False)[0]
        assert states is not None
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float())[..., 0]

    def sync(self) -> None:
        """Mean gradients over all processes; the loss was multiplied by their number."""
        if dist.world() == 1:
            return
        for p in self.parameters():
            if p.grad is not None:
                dist.all_sum(p.grad)
                p.grad /= dist.world()


def own_model(source: Any, folder: str | None, dtype: Any) -> Critic:
    """A critic of its own: from the reward model in `folder`, else from the policy `source`, a checkpoint or a model."""
    if folder:
        model = Checkpoint(folder).model(dtype)
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or head.weight.shape[0] != 1:
            raise UserError(f"{folder} has no score for each token", "the critic would begin from it", "set critic: head")
        weight = head.weight.detach()
    else:
        model, weight = source.model(dtype) if isinstance(source, Checkpoint) else source, None
    size = model.get_output_embeddings().weight.shape[1] if weight is None else weight.shape[1]
    return Critic(model.base_model.float().requires_grad_(True), int(size), weight)


def undropped(model: nn.Module) -> None:
    """Switch dropout off: with it the first ratio of an update would not be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
