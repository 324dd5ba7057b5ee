"""PPO with a critic, over tokens or macro actions (MA-RLHF, arXiv 2410.02743; PPO 1707.06347; RLHF 2203.02155).

A policy writes responses to prompts; a reward judges each as a whole; the policy learns to be judged better while a penalty keeps it near
where it began. A reward at the end of a long response hardly reaches its first tokens: with lambda = 0.95 it arrives as 0.95^255 = 2e-6
after 256 tokens. Here tokens are joined to macro actions that share one value and one advantage, so the way back is shorter. That is all
that they change: the policy still acts token by token. segmenter: token is plain PPO.

One update, tokens i of a response y to a prompt x, reference p0 = the policy at the beginning:
    r_i = -kl KL_i(p || p0), and at the last token + clip(reward(x, y), +-reward_clip)
    macro action m with shares s (they sum to 1):  V_m = sum s_i v_i,   R_m = sum r_i
    delta_m = R_m + gamma V_(m+1) - V_m,   A_m = sum over k of (gamma lam)^k delta_(m+k),   return_m = A_m + V_m
    policy loss = mean over tokens of max(-A ratio, -A clip(ratio, 1 +- clip)),   ratio = p(y_i) / p_old(y_i)
    value loss  = mean over tokens of 1/2 max((v - return)^2, (clip(v, v_old +- value_clip) - return)^2)
Segmenters: ngram (n tokens), random (1, 2, 3, 5 or 10), perplexity (falls under the reference), parse (sentences; rl/macro/segments.py).

The official code (a fork of DeepSpeed-Chat) takes means where the paper takes sums of rewards (reward_agg: mean), which divides the KL
penalty of an action by its length; begins a perplexity action one token early; and where n divides the response's length - 1, n = 1
included, puts an empty action before the last one (compat: official follows both). It works on one response at a time.
Ours: batches of any size without a loop over rows; draws that hang on the seed alone; several passes and minibatches an update; the k3
estimator; a critic on the policy's own states; sentence and length rules in the place of constituency trees; the default of `repeats`.
As in the official code, log-probabilities are those of the unscaled logits, although responses are drawn at `temperature` and `top_k`.

Data: prompts (see rl/rollout/prompts.py). train.batch x train.accumulate x processes x minibatches responses make one update; one pass over
the prompts is train.epochs: 1. train.context does not apply: prompt_tokens and response_tokens do. Dropout is switched off.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train import dist, precision
from modelwright.core.train.objective import NextToken, Outputs, objective_class
from modelwright.core.train.technique import LossTerm, Named, Technique
from modelwright.rl.macro import segments
from modelwright.rl.rollout.critic import Critic, own_model, undropped
from modelwright.rl.rollout.experience import Actors, Terms, experience, joined
from modelwright.rl.rollout.history import History
from modelwright.rl.rollout.objective import PpoObjective, ValueLoss, as_batch
from modelwright.rl.rollout.prompts import Prompts
from modelwright.rl.rollout.reward import Reward
from modelwright.rl.rollout.sample import Sampling


@dataclass(frozen=True)
class Knobs(Tune):
    reward: str | None = knob(None, "folder of a reward model: a sequence classifier with one label", path=True)
    reward_function: str | None = knob(None, "or a function: package.module:name or file.py:name, called with prompts and completions")
    segmenter: Literal["token", "ngram", "random", "perplexity", "parse"] = knob("ngram", "where macro actions begin; token: plain PPO")
    n: int = knob(5, "ngram: tokens of a macro action; the paper takes 5 for text and 10 for programs", low=1)
    repeats: int = knob(3, "random: how often each length stands in the list that is drawn from", low=1)
    cutoff: int = knob(5, "parse: tokens of a macro action, at most", low=1, alias="parser_cutoff")
    shares: Literal["equal", "unit", "position"] = knob("equal", "share of a token in its macro action's value", alias="value_function")
    reward_agg: Literal["sum", "mean"] = knob("sum", "rewards of a macro action: their sum (the paper) or mean (the official code)")
    compat: Literal["paper", "official"] = knob("paper", "official: its early perplexity actions and its empty n-gram actions")
    kl: float = knob(0.05, "weight of the KL penalty", low=0, alias=("kl_ctl", "kl_coef"))
    kl_estimator: Literal["k1", "k3"] = knob("k1", "k1: the log ratio; k3: never below 0, varies less")
    clip: float = knob(0.2, "how far from 1 a ratio counts", low=0, alias="cliprange")
    value_clip: float = knob(0.2, "how far from the old value a value counts", low=0, alias="cliprange_value")
    reward_clip: float = knob(2.5, "largest absolute reward of a response; 0: no limit", low=0)
    gamma: float = knob(1.0, "discount a macro action", low=0, high=1)
    lam: float = knob(0.95, "lambda of the advantage estimates", low=0, high=1)
    ppo_epochs: int = knob(1, "passes over the responses of an update", low=1)
    minibatches: int = knob(1, "optimizer steps of a pass", low=1)
    updates: int | None = knob(None, "updates in the run; empty: by train.epochs or train.tokens", low=1)
    prompt_tokens: int = knob(512, "longest prompt; longer ones are left out and counted", low=1)
    response_tokens: int = knob(512, "longest response", low=1, alias="max_new_tokens")
    temperature: float = knob(0.8, "of sampling; 0: the most probable token", low=0)
    top_k: int = knob(50, "sample among this many tokens; 0: all", low=0)
    rollout_batch: int = knob(64, "responses that a process samples together", low=1)
    critic: Literal["model", "head"] = knob("model", "a model of its own, from the reward model or the policy; or a head on the policy")
    critic_lr: float | None = knob(None, "learning rate of the critic; empty: train.lr", low=0)
    value_weight: float = knob(1.0, "weight of the value loss", low=0, alias="vf_coef")
    holdout: float = knob(0.0, "share of the prompts held out when no evals are given", low=0, high=0.5)


class Ppo(Technique):
    """Makes the roll-outs, holds reference, critic and reward, and what must outlive a stop: critic, kept roll-outs, history."""

    name = "ppo"
    supports = frozenset({"ddp", "fsdp2", "fused", "gradient_checkpointing", "lora"})

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.kept: dict[str, Tensor] = {}  # the roll-outs of the update under way
        self.update = -1
        self.idle = False  # whether the update had nothing to learn from
        self.history = History()
        self.done = 0  # optimizer steps
        self._moments: list[dict[str, Tensor]] = []
        self._states: Tensor | None = None
        self._hook: Any = None
        self._reward: Reward | None = None

    # ---- before training ------------------------------------------------------------------------------------------------
    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> TokenRows:
        self._reward = self._reward or Reward(self.knobs.reward, self.knobs.reward_function, tokenizer)
        return Prompts(tokenizer, self.knobs.prompt_tokens).rows(data, vocab)

    def settings(self, rows: TokenRows, train: Train) -> Train:
        """As many steps as the updates take. The loss of PPO may rise while it learns, so it does not count as diverging."""
        k, together = self.knobs, train.batch * train.accumulate * dist.world()
        passes = train.tokens / rows.tokens if train.tokens else train.epochs
        updates = k.updates or max(1, round(passes * len(rows) / (together * k.minibatches)))
        a_pass = math.ceil(math.ceil(len(rows) / (train.batch * dist.world())) / train.accumulate)  # the loop's steps for one epoch
        return replace(train, tokens=None, epochs=updates * k.ppo_epochs * k.minibatches / a_pass, divergence=0.0)

    def prepare(self, rows: TokenRows) -> TokenRows:
        longest = max(int(rows[i]["length"]) for i in range(len(rows))) + self.knobs.response_tokens
        if self.limit and longest > self.limit:
            raise UserError(
                f"prompt and response take {longest} tokens",
                f"the model has {self.limit} positions",
                "lower response_tokens or prompt_tokens",
            )
        self.prompts = rows
        return rows

    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> PpoObjective:
        if objective_class(model) is not NextToken:
            raise UserError(f"{type(model).__name__} writes no responses", "PPO needs a decoder", "give a causal language model")
        self.train, self.seed, self.tokenizer_used = train, seed, tokenizer
        config, generation = model.config.get_text_config(), getattr(model, "generation_config", None)
        self.limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        ends = getattr(generation, "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        own = getattr(tokenizer, "eos_token_id", None)
        self.sampling = Sampling(
            self.knobs.response_tokens, self.knobs.temperature, self.knobs.top_k, tuple({*ends, *([] if own is None else [own])})
        )
        k = self.knobs
        if k.segmenter == "parse" and tokenizer is None:
            raise UserError("segmenter parse reads text", "the checkpoint has no tokenizer", "choose another segmenter")
        sentences = segments.Sentences(tokenizer, k.cutoff) if k.segmenter == "parse" else None
        self.segmenter = segments.Segmenter(k.segmenter, k.n, k.repeats, k.compat == "official", sentences)
        return PpoObjective(model, tokenizer, seed, self)

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        """Load reference, reward and critic."""
        k = self.knobs
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.reference = (self.source.model(base.dtype) if self.source else deepcopy(base)).eval().requires_grad_(False)
        self.reward = self._reward or Reward(k.reward, k.reward_function, self.tokenizer_used)
        self.reward.load(base.dtype)
        if k.critic == "head":
            self.critic = Critic(None, int(base.get_output_embeddings().weight.shape[1]))
        else:
            folder = self.reward.folder if self.reward.same_tokens else None
            self.critic = own_model(self.source or deepcopy(base), folder, base.dtype)
            if self.train.gradient_checkpointing:
                self.critic.trunk.gradient_checkpointing_enable()
        self._head = self.critic.head.weight.detach().clone()
        undropped(model)
        undropped(self.critic)
        return model

    def begin(self, model: Any) -> None:
        """Called when training starts: everything on the policy's device, its states caught where the critic reads them."""
        self.model = model
        for m in (self.reference, self.critic, self.reward):
            m.to(model.device)
        if self.critic.trunk is None:
            self._hook = model.get_output_embeddings().register_forward_pre_hook(self._caught)

    def end(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _caught(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._states = inputs[0]

    def states(self) -> Tensor | None:
        """The policy's states of its last pass, (B, T, d)."""
        found, self._states = self._states, None
        return found

    def groups(self, named: Named) -> list[dict[str, Any]]:
        k, train = self.knobs, self.train
        lr = train.lr if k.critic_lr is None else k.critic_lr
        return [{"params": list(self.critic.parameters()), "lr": lr, "weight_decay": train.weight_decay}]

    def terms(self) -> list[LossTerm]:
        return [ValueLoss(self.knobs.value_weight)]

    # ---- roll-outs ------------------------------------------------------------------------------------------------------
    def minibatch(self, step: int, at: int) -> dict[str, Tensor]:
        """The roll-outs of this process in the pass `at` of an optimizer step; a new update makes them anew."""
        k, size = self.knobs, self.train.batch
        a_step = size * self.train.accumulate * dist.world()
        update, inner = divmod(step, k.ppo_epochs * k.minibatches)
        if update != self.update:
            self._roll(update, a_step * k.minibatches)
        lap, part = divmod(inner, k.minibatches)
        order = torch.arange(len(self.kept["length"]))
        if k.minibatches > 1:
            order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(self._mixed(update, lap)))]
        first = part * a_step + (at * dist.world() + dist.rank()) * size
        return as_batch({n: v[order[first : first + size]] for n, v in self.kept.items()})

    def _mixed(self, *numbers: int) -> int:
        found = self.seed
        for n in numbers:
            found = (found * 1_000_003 + n + 1) % (1 << 63)
        return found

    def _roll(self, update: int, count: int) -> None:
        n = len(self.prompts)
        which: list[int] = []
        for g in range(update * count, (update + 1) * count):
            lap, place = divmod(g, n)
            if not which or place == 0:
                order = torch.randperm(n, generator=torch.Generator().manual_seed(self._mixed(1 << 20, lap))).tolist()
            which.append(order[place])
        rows = [self.prompts[i] for i in which]
        prompts = [r["input_ids"][: int(r["length"])].long() for r in rows]
        keys: list[tuple[int, ...]] = [(self.seed, update, slot) for slot in range(count)]
        share = count // dist.world()
        mine = slice(dist.rank() * share, (dist.rank() + 1) * share)
        width = max(len(p) for p in prompts) + self.knobs.response_tokens
        self.kept = joined(self._experience(prompts[mine], keys[mine], width), count)
        self.kept["example_id"] = torch.tensor(which)
        self.update = update
        self.history.begin(update, self.kept)
        self.idle = not bool(self.kept["advantages"].any())

    def _experience(self, prompts: list[Tensor], keys: list[tuple[int, ...]], width: int) -> dict[str, Tensor]:
        k = self.knobs
        terms = Terms(self.segmenter, k.kl, k.kl_estimator, k.reward_clip, k.shares, k.reward_agg, k.gamma, k.lam)
        who = Actors(self.model, self.reference, self.critic, self.reward, self.states, self._cast)
        return experience(who, prompts, keys, self.sampling, terms, (k.rollout_batch, self.train.batch, width))

    @contextmanager
    def _cast(self) -> Iterator[None]:
        on = precision.autocasts() and self.train.weights == "fp32"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=on):
            yield

    def evaluate(self, batch: dict[str, Tensor]) -> Outputs:
        """Held-out prompts: the loss is the KL divergence from the reference a token; reward and length beside it."""
        lengths = batch["real"].sum(1).tolist()
        prompts = [row[: max(n, 1)].cpu() for row, n in zip(batch["input_ids"], lengths, strict=True)]
        keys: list[tuple[int, ...]] = [(self.seed, 1 << 31, int(e) + 1) for e in batch["example_id"]]
        found = self._experience(prompts, keys, max(map(len, prompts)) + self.knobs.response_tokens)
        used = torch.tensor([n > 0 for n in lengths])
        device = batch["input_ids"].device
        batch.clear()
        batch.update({n: v.to(device) for n, v in as_batch(found).items()})
        batch["labels"][~used] = IGNORE
        batch["reward"], batch["response tokens"] = found["score"][used], (found["length"] - found["begin"])[used]
        learnt = batch["labels"][:, 1:] != IGNORE
        losses = (batch["old"] - batch["reference"]) * learnt
        return Outputs(losses, losses.sum())

    # ---- while it trains ------------------------------------------------------------------------------------------------
    def before_batch(self, batch: dict[str, Tensor]) -> None:
        for p, state in zip(self.critic.parameters(), self._moments, strict=False):  # a sharded run keeps those of the policy alone
            self.optimizer.state[p] = {n: v.to(p.device) if v.dim() else v for n, v in state.items()}
        self._moments = []

    def note(self, sums: Tensor) -> None:
        self.history.note(sums)

    def on_gradients(self, named: Named) -> None:
        self.critic.sync()
        if self.train.clip:
            nn.utils.clip_grad_norm_(self.critic.parameters(), self.train.clip)

    def after_step(self, named: Named) -> None:
        self.critic.zero_grad()  # the loop does so for the policy alone
        self.history.step()
        self.done += 1

    def liveness(self, moved: dict[str, Tensor]) -> str:
        critic = not torch.equal(self.critic.head.weight.detach().cpu(), self._head.cpu())
        if self.idle:
            return "ppo: no response of the first update was better or worse than another, so there was nothing to learn from it"
        if not critic:
            raise RuntimeError("ppo: the critic did not move in the first step")
        first = self.history.updates[0]
        said = f"{first['length']:.0f} tokens in {first['actions']:.0f} macro actions a response, reward {first['score']:.3g}"
        return f"{super().liveness(moved)}; {said}; the critic moved"

    # ---- what is left ---------------------------------------------------------------------------------------------------
    def facts(self) -> dict[str, Any]:
        return self.history.facts()

    def plots(self) -> list[dict[str, Any]]:
        return self.history.plots()

    def state_dict(self) -> dict[str, Any]:
        inside = self.done % (self.knobs.ppo_epochs * self.knobs.minibatches)
        moments: list[dict[str, Tensor]] = []
        if any(dist.offset(p) is not None for p in self.model.parameters()):
            moments = [{n: v.cpu() for n, v in self.optimizer.state[p].items()} for p in self.critic.parameters()]
        return {
            "critic": {n: v.detach().cpu() for n, v in self.critic.state_dict().items()},
            "moments": moments,
            "kept": dict(self.kept) if inside else {},
            "update": self.update if inside else -1,
            "history": [dict(h) for h in self.history.updates],
            "done": self.done,
            "idle": self.idle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state["critic"])
        self._moments, self.kept, self.update = state["moments"], state["kept"], state["update"]
        self.history.updates, self.done, self.idle = state["history"], state["done"], state["idle"]


METHOD = Ppo
