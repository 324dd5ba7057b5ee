"""UpIT: the checkpoints of one instruction-tuning run become the experts of a mixture (arXiv 2410.01610).

When to use it: you tune a dense model anyway and want a mixture from the same run, without domain corpora. A run passes through
different abilities, so its checkpoints differ as experts; any number of experts is bred from them. Then post-train on all of the data
(tune.full, tune.balance). The paper saves a checkpoint each quarter of an epoch for two epochs, and post-trains for two.

1. Experts: `checkpoints` in the order of the run; too many: evenly spaced ones, the last included; too few: children of the two that are
   least alike, by DARE on their task vectors (reshape/experts/population.py).
2. Seed data: a share of the rows, each given to the expert under which its response is likeliest.
3. A routing vector for each expert and layer, trained in the dense model of that expert on its seed data (reshape/experts/vectors.py).
4. W_router = [r_1; ...; r_E], top k, weights renormalised over the chosen.

The paper's own ablation, which its reviewers point out too: experts that are bred do not beat real checkpoints; breeding is for a number
of experts that you want. The trained vectors are the main gain.

Measured (bench/upit.py, small models, short runs): on four kinds of real text the mixture did not learn faster than copies of the last
checkpoint, although its routers told the kinds apart better. It did where the run passed through three made languages in turn.

No official code was found, so these are reconstructions: what "similar" means (cosine of task vectors), p of DARE (0.5), the rate of the
vectors, and that the vector scales the feed-forward output. Ours: response losses instead of those of whole examples; buckets of one
size (`buckets: paper` takes the plain minimum, which gives nearly all to the last checkpoint); tokens of other experts' examples as
negatives; rows of one norm; resumable states and LoRA adapters are read as checkpoints. All experts share the other weights, also
while the vectors are trained. PEFT's `dare_linear` merges the two factors of an adapter apart (`merge: factors`), so its product
has cross terms and is not unbiased; `merge: weights` is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.data.make import make_rows
from modelwright.core.data.rows import TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Blueprint
from modelwright.core.train.states import all_states
from modelwright.reshape.experts.assemble import Get, dense_parts, dtypes_of, matrices, silent_shared, written_config, zero_biases
from modelwright.reshape.experts.population import Member, Population
from modelwright.reshape.experts.routers import generator, plain_router
from modelwright.reshape.experts.stock import choose
from modelwright.reshape.experts.vectors import buckets, losses, train_vectors


@dataclass(frozen=True)
class Knobs:
    checkpoints: list[str] = knob(
        help="two or more checkpoints of one tuning run of the base, in order: folders, LoRA adapters, states, or a folder of states",
        path=True,
    )
    experts: int = knob(8, "experts per layer", low=2)
    top_k: int = knob(2, "experts per token", low=1)
    rest: Literal["last", "mean", "base"] = knob("last", "what all experts share comes from the last checkpoint, all of them, or the base")
    merge: Literal["weights", "factors"] = knob("weights", "DARE on task vectors, or PEFT's dare_linear on the factors of adapters")
    drop: float = knob(0.5, "share of a task vector that DARE drops", low=0, high=0.99)
    data: Data = knob(Data(), "the data of the tuning run, for the router")
    context: int = knob(256, "tokens per row", low=2)
    seed_share: float = knob(0.01, "share of the rows that the router is made from", low=0, high=1)
    seed_rows: int = knob(64, "rows that the router is made from, at least", low=1)
    buckets: Literal["even", "paper"] = knob("even", "seed rows per expert: one number for all, or to the lowest loss")
    router: Literal["trained", "random"] = knob("trained", "routing vectors, or N(0, 0.02) as a control")
    negatives: bool = knob(True, "vectors also learn to give 0 on the rows of other experts; the paper: no")
    alpha: float = knob(0.5, "share of the next-token loss in the loss of the vectors", low=0, high=1)
    epochs: int = knob(4, "passes over the seed rows", low=1)
    lr: float = knob(1e-2, "rate of the vectors (Adam)", low=0)
    batch: int = knob(8, "rows per step", low=1)
    router_norm: float | None = knob(1.0, "norm of each router row; empty: as trained", low=0)
    target: Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared"] = knob(
        "auto", "stock class of the result"
    )


def upit(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Blueprint, str]:
    """The mixture of the run's checkpoints as a blueprint; `source` is the model before tuning."""
    if knobs.top_k > knobs.experts:
        raise UserError(f"top_k={knobs.top_k} but there are {knobs.experts} experts", how="lower top_k or raise experts")
    anatomy = Anatomy(source.skeleton)
    target = choose(source, anatomy, knobs.experts, knobs.top_k, knobs.target)
    members = [Member(f, source) for f in _folders(knobs.checkpoints)]
    chosen = spaced(members, knobs.experts)
    names = [p.name for p in anatomy if p.role.startswith("ffn.")]
    experts = Population(source, chosen, names, drop=knobs.drop, merge=knobs.merge, seed=seed)
    experts.breed(knobs.experts)
    rest: list[Get] = {"last": [members[-1].get], "mean": [m.get for m in chosen], "base": [source.get]}[knobs.rest]
    facts: dict[str, Any] = {"target": target.model_type, "checkpoints": len(members), "router": knobs.router} | experts.facts()
    vectors = None
    if knobs.router == "trained":
        vectors, found = _trained(source, anatomy, experts, rest, knobs, seed)
        facts |= found
    dtypes = dtypes_of(source, anatomy, target, knobs.experts)
    added = zero_biases(target, dtypes)

    def stream() -> Iterator[Any]:
        yield from dense_parts(rest, anatomy, source)
        yield from added.items()
        for i, block in enumerate(anatomy.blocks):
            ffn = anatomy.ffn(block)
            dtype, width = source.dtype(ffn.down.name), int(source.hf_config.hidden_size)
            for e in range(knobs.experts):  # one expert in memory at a time
                matrix = matrices(partial(experts.weight, e), ffn, dtype)
                yield from target.pieces(block.path, e, *matrix)
            router = plain_router("normal", seed, block.index, knobs.experts, width, 0.02) if vectors is None else vectors[:, i]
            yield target.names(block.path, knobs.experts)[0], router.to(dtype)
            yield from silent_shared(target, block.path, matrix)

    lender = members[-1].checkpoint or source  # its tokenizer and its end tokens are those of the tuned model
    return Blueprint(written_config(target), dtypes, stream, lender, facts), "changed function"


# ---- the checkpoints ---------------------------------------------------------------------------------------------------
def _folders(named: list[str]) -> list[Path]:
    """Every checkpoint that is named; a folder of checkpoint-N gives all of them, oldest first."""

    def whole(folder: Path) -> bool:
        return any((folder / f).is_file() for f in ("config.json", "adapter_config.json", "complete.json"))

    found: list[Path] = []
    for name in named:
        folder = Path(name).expanduser()
        inside = [s for s in all_states(folder) if whole(s)] if folder.is_dir() and not whole(folder) else []
        found += inside or [folder]
    if len(found) < 2:
        raise UserError(
            f"{named[0] if named else 'checkpoints'} gives {len(found)} checkpoint" + "s" * (not found),
            "experts are two or more checkpoints of one run",
            "give several, or use reshape.upcycle, which copies one model",
        )
    return found


def spaced(members: list[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spaced, the last of each stretch: later checkpoints make better experts."""
    if len(members) <= most:
        return members
    return [members[math.ceil((i + 1) * len(members) / most) - 1] for i in range(most)]


# ---- the router --------------------------------------------------------------------------------------------------------
def _trained(
    source: Checkpoint, anatomy: Anatomy, experts: Population, rest: list[Get], knobs: Knobs, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """Router rows (E, layers, d), and what the report tells of the seed data."""
    if not knobs.data.path and not knobs.data.sources:
        raise UserError("router=trained needs the data of the tuning run", "experts are told apart by it", "give data: {path: FILE}")
    config = source.hf_config
    context = min(knobs.context, int(config.max_position_embeddings))
    rows = make_rows(knobs.data, source.tokenizer(), int(config.vocab_size), context, seed=seed)
    seeds = _seed_rows(rows, knobs, seed)
    if len(seeds) < len(experts):
        raise UserError(f"{len(seeds)} seed rows for {len(experts)} experts", "each needs one", "give more data, or fewer experts")
    model = source.model(torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    _load(model, dict(dense_names(rest, anatomy)))
    loss = torch.stack([losses(_with(model, experts, e), rows, seeds, knobs.batch) for e in range(len(experts))], 1)  # (N, E)
    owner = buckets(loss, even=knobs.buckets == "even")
    vectors, empty = [], 0
    for e in range(len(experts)):
        own = [r for r, o in zip(seeds, owner.tolist(), strict=True) if o == e]
        others = [r for r, o in zip(seeds, owner.tolist(), strict=True) if o != e] if knobs.negatives else []
        if not own:  # the paper's rule can leave an expert without an example: it gets a vector without knowledge
            empty += 1
            vectors.append(torch.randn(len(anatomy.blocks), config.hidden_size, generator=generator(seed, "vector", e)))
            continue
        how: dict[str, Any] = {"alpha": knobs.alpha, "epochs": knobs.epochs, "lr": knobs.lr, "batch": knobs.batch}
        vectors.append(train_vectors(_with(model, experts, e), rows, own, others, key=(seed, "vectors", e), **how))
    found = torch.stack(vectors)
    if knobs.router_norm is not None:
        found = torch.nn.functional.normalize(found, dim=2) * knobs.router_norm
    return found, _told(loss, owner, empty)


def _seed_rows(rows: TokenRows, knobs: Knobs, seed: int) -> list[int]:
    count = min(len(rows), max(knobs.seed_rows, math.ceil(knobs.seed_share * len(rows))))
    return torch.randperm(len(rows), generator=generator(seed, "seed rows"))[:count].tolist()


def dense_names(rest: list[Get], anatomy: Anatomy) -> Iterator[tuple[str, Tensor]]:
    """What the experts share, under the dense model's own names, fp32."""
    for part in anatomy:
        if not part.role.startswith("ffn."):
            yield part.name, torch.stack([get(part.name).float() for get in rest]).mean(0)


@torch.no_grad()
def _load(model: Any, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)


def _with(model: Any, experts: Population, e: int) -> Any:
    """The dense model with the feed-forward parts of expert e."""
    _load(model, {name: experts.weight(e, name) for name in experts.names})
    return model


def _told(loss: Tensor, owner: Tensor, empty: int) -> dict[str, Any]:
    sizes = torch.bincount(owner, minlength=loss.shape[1]).tolist()
    told: dict[str, Any] = {
        "seed rows": len(loss),
        "seed rows per expert": ", ".join(map(str, sizes)),
        "response loss per expert": ", ".join(f"{v:.3f}" for v in loss.mean(0).tolist()),
    }
    return told | ({"experts without a seed row": empty} if empty else {})


METHOD = upit
