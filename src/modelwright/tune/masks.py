"""Mixture of Masks (Masks Can be Learned as an Alternative to Experts, ACL 2025): experts are masks over one feed-forward part.

What for: a dense decoder that is to serve faster, where some continued training can be paid for. Unlike the parts of a split, experts may
share neurons: each is a mask over the neurons of the same feed-forward part, learnt from the start where everything is on.

Only the abstract could be read, and the official code could not be reached. From the abstract: masks multiply the inner activations, an L0
penalty lessens the active parameters, training begins with everything active and makes the model sparse little by little, neurons become
shared (on in all experts), specific (in some) or inactive (in none). The rest is a reconstruction with standard parts. Per layer, with the
router W_r (E, d) and gates z (E, F) of log_alpha:

    p = softmax(W_r x), T = top-k(p), g_e = p_e / (sum of p over T)      y = W_down ((sum over T of g_e z_e) * act(W_gate x) * (W_up x))
    share of active neurons a = mean over tokens and neurons of 1 - prod over e in T of (1 - P(z_ej > 0))
    loss = LM + lambda1 (a - t) + lambda2 (a - t)^2 + balance * E sum f P,   t falls from 1 to `target` over the share `ramp` of the steps

a is of the union of the k chosen masks, on the micro-batch at hand; a mean over all experts would count too little for k > 1. In
evaluation, step 0 is the dense model exactly: all gates are 1 and the coefficients sum to 1. For the last share `hard` of the steps each
mask is fixed at its likeliest neurons, as many as are expected to be on, and the rest trains on. Fixed masks overlap less than drawn ones,
so all these numbers are scaled by one factor, with which the tokens of the step before use the target share. The result is saved as a
stock mixture of experts with inactive neurons gone and shared ones in a shared expert (tune/pruning/mixture.py). Specific neurons are
copied once per mask that has them, so the file may grow: see `memory` in the facts.

With top_k 1 the coefficient is always 1, so the language model's loss does not train the router: it stays where k-means put it, but for the
balance. `how` magnitude and random are the controls: masks made once, at the start, by |W_down| |W_up| or by lot.
On stories260K, in 48 steps, learnt masks lose far more than either control: 4.05 nats per token at half of the neurons, against 1.93
by magnitude and 1.95 at random (dense 1.19). Whether longer training changes this is not known: compare with the controls.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.core.data.rows import IGNORE, TokenRows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.hooks import capture
from modelwright.core.train import dist
from modelwright.core.train.constraint import Constrained, Gates, Goal, detach, keep_largest, open_probability, settled
from modelwright.core.train.technique import LossTerm, Named, Technique
from modelwright.core.train.trainer import forward
from modelwright.moe import balance
from modelwright.tune.pruning.mixture import narrower, require_masks

_TOKENS = 4096  # that routers start from


@dataclass(frozen=True)
class Knobs(Tune):
    experts: int = knob(8, "E: masks per layer", low=1)
    top_k: int = knob(2, "k: masks per token", low=1)
    target: float = knob(0.5, "share of the neurons that a token uses at the end", low=0, high=1)
    ramp: float = knob(0.5, "share of the steps over which the target falls", low=0, high=1)
    hard: float = knob(0.1, "last share of the steps, trained with fixed masks", low=0, high=1)
    how: Literal["learnt", "magnitude", "random"] = knob("learnt", "learnt, or made once at the start: the controls")
    scope: Literal["global", "layer"] = knob("global", "the target is of all layers together, or of each")
    trains: Literal["all", "masks"] = knob("all", "masks: every weight of the model stays as it is")
    router: Literal["kmeans", "random"] = knob("kmeans", "routers start from clusters of what the layers are given, or by chance")
    begin: float = knob(5.0, "log_alpha at the start; 5: a drawn gate is 1 with probability 0.968", low=2.4)
    mask_lr: float = knob(0.1, "learning rate of log_alpha", low=0)
    multiplier_lr: float = knob(1.0, "learning rate of lambda1 and lambda2", low=0)
    router_lr: float = knob(1e-3, "learning rate of the routers", low=0)
    balance: float = knob(0.01, "coefficient of the balance loss", low=0)
    distill: float = knob(0.0, "coefficient of the divergence from the dense model's predictions; 0: off", low=0)
    temperature: float = knob(2.0, "of that divergence", low=0.1)


class Parts(nn.Module):
    """log_alpha (L, E, F), routers (L, E, d), and the fixed masks (L, E, F) once there are some."""

    def __init__(self, layers: int, experts: int, neurons: int, width: int, begin: float, seed: int):
        super().__init__()
        self.gates = Gates((layers, experts, neurons), begin, seed)
        self.router = nn.Parameter(torch.zeros(layers, experts, width))
        self.register_buffer("hard", torch.zeros(layers, experts, neurons, dtype=torch.uint8))


class Masks(Constrained):
    """Adds masks and routers, and holds the share of active neurons to a target."""

    name = "masks"

    def __init__(self, knobs: Knobs):
        super().__init__(knobs.mask_lr, knobs.multiplier_lr, knobs.ramp)
        self.knobs = knobs
        self.whole_logits = knobs.distill > 0
        self.fixed = False  # whether the masks are
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}  # logits and chosen experts of each layer
        self.mixed: dict[int, Tensor] = {}
        self.sets: list[tuple[Tensor, Tensor]] = []  # of each layer: sets of experts that were chosen (S, k), and how often
        self.by_layer: list[float] = []  # share of active neurons under the fixed masks
        if knobs.top_k > knobs.experts:
            raise UserError(
                f"masks: top_k={knobs.top_k} of {knobs.experts} experts", "a token cannot take more than there are", "lower top_k"
            )

    # ---- the model
    def build(self, model: Any, anatomy: Anatomy) -> nn.Module:
        require_masks(anatomy)
        self.neurons, k = int(anatomy.config.intermediate_size), self.knobs
        if k.target * self.neurons < 1:
            raise UserError(f"masks: target={k.target} leaves no neuron", f"the model has {self.neurons} a layer", "give a larger target")
        self.ffns = [b.feed_forward for b in anatomy.blocks]
        self.downs = [model.get_submodule(anatomy.ffn(b).down.name.removesuffix(".weight")) for b in anatomy.blocks]
        return Parts(len(self.ffns), k.experts, self.neurons, int(anatomy.config.hidden_size), k.begin, 0)

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        self.seed = self.model.constraint.parts.gates.seed = seed
        if self.knobs.trains == "masks":
            for n, p in model.named_parameters():
                p.requires_grad_(n.startswith("constraint."))

    def prepare(self, rows: TokenRows) -> TokenRows:
        """Routers by chance, or from clusters of the inputs of the feed-forward parts."""
        router, rng = self.model.constraint.parts.router, torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            router.copy_(torch.randn(router.shape, generator=rng) / math.sqrt(router.shape[-1]))
        if self.knobs.router == "kmeans" and self.knobs.experts > 1:
            seen: dict[nn.Module, list[Tensor]] = {m: [] for m in self.ffns}
            n = max(1, min(len(rows), _TOKENS // max(len(rows[0]["input_ids"]), 1)))
            training = self.model.training
            self.model.eval()
            for i in range(n):
                batch = {k: v.to(self.model.device) for k, v in collate([rows[i]]).items()}
                real = batch["real"].flatten()

                def keep(m: nn.Module, x: Tensor, real: Tensor = real) -> None:
                    seen[m].append(x.flatten(0, -2)[real])

                with torch.no_grad(), capture(self.ffns, keep, side="input"):
                    forward(self.model, batch)
            self.model.train(training)
            for i, m in enumerate(self.ffns):
                centres = _clusters(torch.cat(seen[m]).float(), self.knobs.experts, self.seed + i)
                with torch.no_grad():
                    router[i].copy_(centres)
        return rows

    # ---- one pass
    def enter(self, parts: nn.Module, training: bool) -> None:
        first = self.steps - max(1, round(self.knobs.hard * self.steps)) if self.knobs.how == "learnt" else 0
        if self.step >= first and not self.fixed:
            parts.hard.copy_(self._hardened(parts.gates.log_alpha.detach()))  # type: ignore[operator,union-attr]
            self.fixed = True
        log_alpha = parts.gates.log_alpha  # type: ignore[union-attr]
        self.router: Any = parts.router
        if self.fixed:
            self.z: Any = parts.hard.float()  # type: ignore[operator]
        else:
            self.z = parts.gates(self.step) if training else settled(log_alpha)  # type: ignore[operator, arg-type]
        self.heard = {}

    def _hardened(self, log_alpha: Tensor) -> Tensor:
        k = self.knobs
        if k.how == "learnt":
            return self._as_many(log_alpha).byte()
        anatomy, weights = Anatomy(self.stock()), dict(self.model.named_parameters())
        rng, scores = torch.Generator().manual_seed(self.seed), []
        for b in anatomy.blocks:
            ffn = anatomy.ffn(b)
            size = [v.read(weights.__getitem__).detach().float().norm(dim=d).cpu() for v, d in ((ffn.down, 0), (ffn.up, 1))]
            scores.append(size[0] * size[1] if k.how == "magnitude" else torch.rand(self.neurons, generator=rng))
        masks = keep_largest(torch.stack(scores), torch.full((len(scores),), round(k.target * self.neurons)))
        return masks[:, None].expand(-1, k.experts, -1).byte()

    def _as_many(self, log_alpha: Tensor) -> Tensor:
        """The likeliest neurons of each mask, in numbers proportional to the expected ones, that reach the target together."""
        expected, low, high = open_probability(log_alpha).sum(-1), 0.0, 4.0
        if not self.sets:
            low = high = 1.0
        for _ in range(16 if self.sets else 0):
            middle = (low + high) / 2
            share = float(self._active(keep_largest(log_alpha, (middle * expected).round()).float()).mean())
            low, high = (middle, high) if share <= self.knobs.target else (low, middle)
        factor = float(dist.sum_over_ranks(torch.tensor(low))[0]) / dist.world()
        return keep_largest(log_alpha, (factor * expected).round().clamp(min=1))

    def stock(self) -> Any:
        """The model's names and shapes without what was added."""
        with torch.device("meta"):
            return type(self.model)._from_config(self.model.config)

    def _route(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0]
            with torch.autocast(x.device.type, enabled=False):
                logits = F.linear(x.flatten(0, -2).float(), self.router[layer])
                top, index = logits.topk(self.knobs.top_k, -1)
                g = torch.zeros_like(logits).scatter(1, index, top.softmax(-1))
                self.mixed[layer] = (g @ self.z[layer]).view(*x.shape[:-1], -1)
            self.heard[layer] = logits, index

        return hook

    def _mask(self, layer: int) -> Any:
        return lambda module, args: args[0] * self.mixed.pop(layer).to(args[0].dtype)

    def before_batch(self, batch: dict[str, Tensor]) -> None:
        self.real = batch["real"].flatten()

    # ---- what is learnt
    def terms(self) -> list[LossTerm]:
        for i, (ffn, down) in enumerate(zip(self.ffns, self.downs, strict=True)):
            self._handles += [ffn.register_forward_pre_hook(self._route(i)), down.register_forward_pre_hook(self._mask(i))]
        found = super().terms()
        if self.knobs.balance and self.knobs.experts > 1:
            found.append(_Balance(self))
        return [*found, *([_Distill(self)] if self.knobs.distill else [])]

    def aims(self, parts: nn.Module) -> dict[str, Goal]:
        return {"active": Goal(self.knobs.target, 1.0)}

    def _active(self, on: Tensor) -> Tensor:
        """Share of the neurons that the real tokens use in each layer (L,), from probabilities or masks (L, E, F)."""
        found = []
        for i, (sets, counts) in enumerate(self.sets):
            off = (1 - on[i][sets]).prod(1).mean(-1)  # of each set of experts
            found.append(1 - (counts / counts.sum().clamp(min=1)).to(off) @ off)
        return torch.stack(found)

    def values(self, parts: nn.Module) -> dict[str, Tensor]:
        each = self._active(parts.gates.active())  # type: ignore[operator,union-attr]
        return {"active": each if self.knobs.scope == "layer" else each.mean()}

    def penalty(self) -> Tensor:
        chosen = [index[self.real].sort(-1).values for _, (_, index) in sorted(self.heard.items())]
        self.sets = [c.unique(dim=0, return_counts=True) for c in chosen]
        if not self.fixed:
            return super().penalty()
        each = self._active(self.z)
        self.by_layer, self.measured["active"] = [round(float(v), 4) for v in each], float(each.mean())
        return torch.stack([0 * p.sum() for n, p in self.model.constraint.named_parameters() if n != "parts.router"]).sum()

    def groups(self, named: Named) -> list[dict[str, Any]]:
        named = list(named)
        routers = [p for n, p in named if n == "constraint.parts.router"]
        rest = super().groups((n, p) for n, p in named if n != "constraint.parts.router")
        return [*rest, {"params": routers, "lr": self.knobs.router_lr, "weight_decay": 0.0}]

    # ---- what is left
    def liveness(self, moved: dict[str, Tensor]) -> str:
        return Technique.liveness(self, moved) if self.fixed else super().liveness(moved)

    def facts(self) -> dict[str, Any]:
        hard = self.model.constraint.parts.hard.bool()
        shared, some, each = hard.all(1), hard.any(1), hard.sum((1, 2))
        specific = some & ~shared
        held = shared.sum(1) + each - hard.shape[1] * shared.sum(1)
        return super().facts() | {
            "shared": _share(shared),
            "specific": _share(specific),
            "inactive": _share(~some),
            "memory": float(held.float().mean()) / self.neurons,
            "active by layer": self.by_layer,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"fixed": self.fixed, "by_layer": self.by_layer, "sets": self.sets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.fixed, self.by_layer, self.sets = state["fixed"], state["by_layer"], state["sets"]

    def export(self, model: Any, folder: Any) -> Any:
        parts = detach(model)
        return narrower(model, parts.hard.bool(), parts.router.detach(), self.knobs.top_k)  # type: ignore[operator,union-attr]


class _Balance(LossTerm):
    """The Switch loss, mean over layers; micro-batches weigh by their tokens."""

    name = "mask balance"

    def __init__(self, owner: Masks):
        self.owner, self.weight = owner, owner.knobs.balance

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["real"].sum()

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        o, real = self.owner, batch["real"].flatten()
        each = [
            balance.switch(logits.softmax(-1), balance.counts_of(index, o.knobs.experts, real), real=real)
            for logits, index in o.heard.values()
        ]
        return torch.stack(each).mean()[None] * batch["real"].sum()


class _Distill(LossTerm):
    """T^2 KL(dense || masked) of the predictions of the learnt tokens."""

    name = "distillation"

    def __init__(self, owner: Masks):
        self.owner, self.weight = owner, owner.knobs.distill
        kind = next(p.dtype for p in owner.model.parameters())
        self.teacher = owner.source.model(kind).to(owner.model.device).eval()

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != IGNORE).sum()

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        t = self.owner.knobs.temperature
        with torch.no_grad():
            aim = (forward(self.teacher, batch).logits[:, :-1].float() / t).log_softmax(-1)
        mine = (outputs.logits[:, :-1].float() / t).log_softmax(-1)
        each = t * t * (aim.exp() * (aim - mine)).sum(-1)
        return (each * (batch["labels"][:, 1:] != IGNORE)).sum(1)


def _share(where: Tensor) -> float:
    return float(where.float().mean())


def _clusters(x: Tensor, n: int, seed: int, rounds: int = 10) -> Tensor:
    """Unit centres (n, d) of the directions of x (N, d), scaled so that the scores of x spread by about 1."""
    unit, rng = F.normalize(x, dim=1), torch.Generator().manual_seed(seed)
    centres = unit[torch.randperm(len(unit), generator=rng)[:n].to(x.device)]
    centres = torch.cat([centres, torch.randn(n - len(centres), x.shape[1], generator=rng).to(x.device)])
    for _ in range(rounds):
        label = (unit @ F.normalize(centres, dim=1).T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, label, unit)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, sums, centres)
    centres = F.normalize(centres, dim=1)
    return centres / (x @ centres.T).std(1).mean().clamp(min=1e-6) if n > 1 else centres


METHOD = Masks
