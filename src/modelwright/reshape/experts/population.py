"""Checkpoints of one training run as a population of experts, and new ones bred from them (UpIT, arXiv 2410.01610).

A member is what it adds to the model before tuning, its task vector: delta = E - base, over the feed-forward weights. A child of two
members is DARE's merge of their task vectors (2311.03099):

    child = a * dare(delta_j) + (1 - a) * dare(delta_k),   dare(x) = m * x / (1 - p),   m ~ Bernoulli(1 - p),   a ~ U(0, 1)

which is unbiased: its expectation is a * delta_j + (1 - a) * delta_k. The parents are the two members that are least alike by the cosine
of their task vectors. A pair has one child only: a child does not change how alike its parents are, so the same pair would win forever.

Weights are read tensor by tensor and children are computed when they are read: nothing but the scalar products is kept.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint, require_finite
from modelwright.reshape.experts.assemble import Get
from modelwright.reshape.experts.routers import generator

# settings of a checkpoint that its function does not depend on
_FREE = {"dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache", "attention_dropout", "_name_or_path"}
_FREE |= {"bos_token_id", "eos_token_id", "pad_token_id", "architectures"}
Factors = Callable[[str], tuple[Tensor, Tensor] | None]  # B (out, r) * scale and A (r, in) of an adapted weight


class Member:
    """One checkpoint of the run: whole weights, a resumable state of a training run, or a LoRA adapter."""

    def __init__(self, folder: str | Path, base: Checkpoint):
        self.folder, self.base = Path(folder), base
        self.checkpoint: Checkpoint | None = None
        self.factors: Factors | None = None
        if (self.folder / "adapter_config.json").is_file() and not (self.folder / "config.json").is_file():
            self.factors = _adapter(self.folder)
            self.get: Get = self._adapted
        elif (self.folder / "complete.json").is_file():
            held = _state(self.folder, base)
            self.get = lambda name: held[name] if name in held else base.get(name)
        else:
            self.checkpoint = Checkpoint(self.folder)
            self.get = self.checkpoint.get
            _require_same(self.checkpoint, base)

    def _adapted(self, name: str) -> Tensor:
        assert self.factors is not None
        pair = self.factors(name)
        weight = self.base.get(name)
        return weight if pair is None else weight.float() + pair[0] @ pair[1]


def _require_same(found: Checkpoint, base: Checkpoint) -> None:
    for name in base.skeleton.state_dict():
        if name in base and (name not in found or found.shape(name) != base.shape(name)):
            raise UserError(
                f"{found.folder} does not have the shape of {base.folder}", f"{name} differs", "give checkpoints of one run of the base"
            )
    ours, theirs = base.hf_config.to_dict(), found.hf_config.to_dict()
    if differs := sorted(k for k in (ours.keys() | theirs.keys()) - _FREE if ours.get(k) != theirs.get(k)):
        raise UserError(
            f"{found.folder} computes otherwise than {base.folder}", f"they differ in {', '.join(differs)}", "give checkpoints of one run"
        )


def _state(folder: Path, base: Checkpoint) -> dict[str, Tensor]:
    """The weights of a resumable state `checkpoint-N`; what was frozen is not among them."""
    files = sorted(folder.glob("weights-*.pt"))
    if len(files) != 1:
        why = "its weights are spread over several processes" if files else "it holds no weights"
        raise UserError(f"the state {folder} cannot be read", why, "give checkpoints that were saved whole")
    held: dict[str, Tensor] = torch.load(files[0], weights_only=True, map_location="cpu", mmap=True)
    for name, tensor in held.items():
        if name not in base or base.shape(name) != tuple(tensor.shape):
            raise UserError(f"{folder} does not have the shape of {base.folder}", f"{name} differs", "give states of a run of the base")
        require_finite(name, tensor, folder)
    return held


def _adapter(folder: Path) -> Factors:
    """The factors of a PEFT LoRA adapter, scale included."""
    from safetensors.torch import load_file

    settings = json.loads((folder / "adapter_config.json").read_text())
    odd = [k for k in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save") if settings.get(k)]
    if settings.get("peft_type") != "LORA" or odd or not (folder / "adapter_model.safetensors").is_file():
        why = f"it has {', '.join(odd)}" if odd else "it is no LoRA adapter in safetensors"
        raise UserError(f"{folder} cannot be read", why, "merge the adapter and give the whole checkpoint")
    held = load_file(folder / "adapter_model.safetensors")
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)

    def factors(name: str) -> tuple[Tensor, Tensor] | None:
        at = "base_model.model." + name.removesuffix(".weight")
        if f"{at}.lora_A.weight" not in held:
            return None
        return held[f"{at}.lora_B.weight"].float() * scale, held[f"{at}.lora_A.weight"].float()

    return factors


class Population:
    """Members, then children; `weight(e, name)` is a feed-forward weight of expert e."""

    def __init__(self, base: Checkpoint, members: list[Member], names: list[str], *, drop: float, merge: str, seed: int):
        self.base, self.members, self.names = base, members, names
        self.drop, self.merge, self.seed = drop, merge, seed
        self.children: list[tuple[int, int, float]] = []
        if merge == "factors" and any(m.factors is None for m in members):
            raise UserError("merge=factors is for LoRA adapters", "a whole checkpoint has no factors", "set merge=weights")

    def __len__(self) -> int:
        return len(self.members) + len(self.children)

    def weight(self, e: int, name: str) -> Tensor:
        """A weight of expert e, fp32; one of a member that is a checkpoint is as stored."""
        if e < len(self.members):
            return self.members[e].get(name).float()
        return self.base.get(name).float() + self.delta(e, name)

    def delta(self, e: int, name: str) -> Tensor:
        """What expert e adds to the base, fp32."""
        if e < len(self.members):
            return self.members[e].get(name).float() - self.base.get(name).float()
        if self.merge == "factors":
            pair = self.factors(e, name)
            return torch.zeros(self.base.shape(name)) if pair is None else pair[0] @ pair[1]
        j, k, a = self.children[e - len(self.members)]
        return sum(
            share * dare(self.delta(parent, name), self.drop, generator(self.seed, "dare", e, parent, name))
            for parent, share in ((j, a), (k, 1 - a))
        )  # type: ignore[return-value]

    def factors(self, e: int, name: str) -> tuple[Tensor, Tensor] | None:
        """PEFT's `dare_linear` of the parents' factors: each factor is merged apart, with the roots of the shares."""
        if e < len(self.members):
            of = self.members[e].factors
            assert of is not None
            return of(name)
        from peft.utils.merge_utils import dare_linear

        j, k, a = self.children[e - len(self.members)]
        pairs = [self.factors(j, name), self.factors(k, name)]
        if pairs[0] is None or pairs[1] is None:
            return None
        shares = torch.tensor([a, 1 - a]).sqrt()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.seed, "dare", e, name).initial_seed())
            one, two = (dare_linear([p[i] for p in pairs if p], shares, density=1 - self.drop) for i in (0, 1))
        return one, two

    def breed(self, size: int) -> None:
        """Add children until there are `size` experts."""
        dots = self._dots()
        while len(self) < size:
            used = {(j, k) for j, k, _ in self.children}
            j, k = least_alike(dots, used)
            a = float(torch.rand((), generator=generator(self.seed, "share", len(self)), dtype=torch.float64))
            self.children.append((j, k, a))
            if len(self) < size:
                dots = self._with_last(dots)

    def _dots(self) -> Tensor:
        """Scalar products of the members' task vectors (n, n), fp64, in one pass over the weights."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for name in self.names:
            flat = torch.stack([self.delta(e, name).flatten() for e in range(len(self))])
            total += (flat @ flat.T).double()
        return total

    def _with_last(self, dots: Tensor) -> Tensor:
        n = len(self)
        wider = torch.zeros(n, n, dtype=torch.float64)
        wider[:-1, :-1] = dots
        for name in self.names:
            last = self.delta(n - 1, name).flatten()
            row = torch.stack([self.delta(e, name).flatten() @ last for e in range(n - 1)]).double()
            wider[-1, :-1] += row
            wider[:-1, -1] += row
            wider[-1, -1] += (last @ last).double()
        return wider

    def facts(self) -> dict[str, Any]:
        """What was bred, for the report."""
        if not self.children:
            return {}
        told = [f"{j} x {k} ({a:.2f})" for j, k, a in self.children]
        return {"bred experts": len(self.children), "parents (share of the first)": ", ".join(told)}


def dare(delta: Tensor, drop: float, g: torch.Generator) -> Tensor:
    """Drop entries at random and scale the rest, so that the expectation stays."""
    if drop == 0:
        return delta
    return delta * (torch.rand(delta.shape, generator=g) >= drop) / (1 - drop)


def cosines(dots: Tensor) -> Tensor:
    """Cosines from scalar products (n, n). A task vector of length 0 is like every other: it brings nothing new."""
    norm = dots.diagonal().clamp(min=0).sqrt()
    both = norm[:, None] * norm
    return torch.where(both > 0, dots / both.clamp(min=1e-300), 1.0)


def least_alike(dots: Tensor, used: set[tuple[int, int]]) -> tuple[int, int]:
    """The pair (j, k), j < k, of lowest cosine that has no child yet; ties go to the lower numbers."""
    found = cosines(dots)
    pairs = [(j, k) for j in range(len(dots)) for k in range(j + 1, len(dots)) if (j, k) not in used]
    return min(pairs, key=lambda pair: (float(found[pair]), pair))
