"""The roll-outs of one update: responses, their rewards, and what the policy is to learn from them.

All columns are kept on the CPU, one row a response, the same on every process. Columns of tokens are (P, T - 1) and lie over the targets,
as `labels[:, 1:]` do: position t stands for token t + 1, predicted from tokens 0..t.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.train import dist
from modelwright.rl.macro import segments
from modelwright.rl.rollout.critic import Critic
from modelwright.rl.rollout.reward import Reward
from modelwright.rl.rollout.sample import Sampling, responses

Keys = list[tuple[int, ...]]


@dataclass(frozen=True)
class Terms:
    """How rewards become advantages."""

    actions: Callable[[segments.Responses], Tensor]  # numbers of the macro actions, (B, T), -1 outside
    kl: float
    estimator: str
    reward_clip: float
    shares: str
    aggregate: str
    gamma: float
    lam: float


@dataclass
class Actors:
    """Who takes part in a roll-out."""

    model: Any
    reference: Any
    critic: Critic
    reward: Reward
    states: Callable[[], Tensor | None]  # the policy's states of its last pass, where the critic reads them
    cast: Callable[[], AbstractContextManager[Any]]  # the precision of training


def logp_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (B, T-1) of ids (B, T) from logits (B, T, V)."""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return -flat.view(len(ids), -1)


@torch.no_grad()
def entropy_of(logits: Tensor) -> Tensor:
    """Entropy (B, T-1) of the next token."""
    logp = logits[:, :-1].float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def kl_of(logp: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """KL divergence from the reference at each token, in nats: k1 = log ratio (unbiased), or k3 = exp(-k1) - 1 + k1 (never below 0)."""
    ratio = logp - reference
    return ratio if estimator == "k1" else torch.expm1(-ratio) + ratio


def estimated(columns: dict[str, Tensor], mask: Tensor, actions: Tensor, t: Terms) -> dict[str, Tensor]:
    """Advantages and returns of each token, (B, T-1), from log-probabilities, values and one score a response.

    r_i = -kl KL_i, plus the clipped score at the last token. Over a macro action with shares s:
    V = sum s_i v_i, R = sum r_i (or sum s_i r_i).
    """
    rewards = -t.kl * kl_of(columns["logp"], columns["reference"], t.estimator) * mask
    score = columns["score"].clamp(-t.reward_clip, t.reward_clip) if t.reward_clip else columns["score"]
    last = mask.cumsum(1).argmax(1, keepdim=True)
    rewards = rewards.scatter_add(1, last, score[:, None])
    shares = segments.weights(actions, t.shares)
    values = segments.summed(shares * columns["values"], actions)
    macro = segments.summed(rewards * (shares if t.aggregate == "mean" else 1.0), actions)
    gains = segments.advantages(macro, values, t.gamma, t.lam)
    return {"advantages": segments.spread(gains, actions), "returns": segments.spread(gains + values, actions)}


@torch.no_grad()
def experience(who: Actors, prompts: list[Tensor], keys: Keys, how: Sampling, t: Terms, sizes: tuple[int, int, int]) -> dict[str, Tensor]:
    """The columns of one process's prompts. `sizes`: rows sampled together, rows scored together, width of the columns."""
    training, parts = who.model.training, []
    who.model.eval()
    try:
        with who.cast():
            made = responses(who.model, prompts, keys, how, sizes[0])
            for i in range(0, len(prompts), sizes[1]):
                window = slice(i, i + sizes[1])
                parts.append(_scored(who, prompts[window], made[window], keys[window], t, sizes))
    finally:
        who.model.train(training)
        dist.reshard(who.model)
    ended = [bool(how.stops) and int(r[-1]) in how.stops for r in made]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]} | {"ended": torch.tensor(ended).float()}


def joined(local: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The columns of all processes, one after the other, as wide as the longest row."""
    whole = {k: _whole(v, count) for k, v in local.items()}
    longest, width = int(whole["length"].max()), whole["input_ids"].shape[1]
    return {k: v[:, : longest - (v.shape[1] < width)] if v.dim() > 1 else v for k, v in whole.items()}


def _whole(local: Tensor, count: int) -> Tensor:
    if dist.world() == 1:
        return local
    out = local.new_zeros(count, *local.shape[1:])
    out[dist.rank() * len(local) : (dist.rank() + 1) * len(local)] = local
    return dist.all_sum(out)


def _scored(who: Actors, prompts: list[Tensor], made: list[Tensor], keys: Keys, t: Terms, sizes: tuple[int, int, int]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.cat([p, r]) for p, r in zip(prompts, made, strict=True)], batch_first=True)
    begin, length = (torch.tensor([len(x) for x in xs]) for xs in (prompts, made))
    length = length + begin
    at = torch.arange(ids.shape[1])
    seen = (at < length[:, None]).long()
    mask = (at[:-1] >= begin[:, None] - 1) & (at[:-1] < length[:, None] - 1)
    device = who.model.device
    there, shown = ids.to(device), seen.to(device)
    logits = who.model(input_ids=there, attention_mask=shown, use_cache=False).logits
    columns = {"logp": logp_of(logits, there), "entropy": entropy_of(logits)}
    del logits
    columns["values"] = who.critic(there, shown, who.states())[:, :-1]
    columns["reference"] = logp_of(who.reference(input_ids=there, attention_mask=shown, use_cache=False).logits, there)
    columns = {k: v.float().cpu() * mask for k, v in columns.items()}
    columns["score"] = who.reward(prompts, made, sizes[1])
    actions = t.actions(segments.Responses(mask, ids[:, 1:], columns["reference"], [(*k, 2) for k in keys]))
    columns |= estimated(columns, mask, actions, t)
    kl = (kl_of(columns["logp"], columns["reference"], t.estimator) * mask).sum(1)
    kept = ("logp", "values", "advantages", "returns", "reference")
    wide = {k: F.pad(columns[k], (0, sizes[2] - 1 - mask.shape[1])) for k in kept}
    wide["input_ids"] = F.pad(ids, (0, sizes[2] - ids.shape[1]))
    means = {"kl": kl, "entropy": columns["entropy"].sum(1) / mask.sum(1), "score": columns["score"]}
    macro = {"actions": actions.amax(1).float() + 1}
    return wide | means | macro | {"begin": begin, "length": length}
