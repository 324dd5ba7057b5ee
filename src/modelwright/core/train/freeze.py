"""What may move: whole tensors by requires_grad, parts of fused tensors by rule, halves of a model by lot.

A frozen tensor is never given to the optimizer, so neither momentum nor weight decay moves it. Of a fused tensor (qkv,
gate_up, stacked experts) a piece may be frozen alone: its gradient is zeroed before clipping and its values are put back
after the step, since masking a gradient does not stop Adam.
"""

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy, Block, Part
from modelwright.core.train import dist
from modelwright.core.train.technique import Named, Technique, in_out, plain_name

Piece = tuple[str, str]  # parameter name, piece of it ("" for the whole)


class Freezing(Technique):
    """A technique that freezes pieces. Call `freeze` from `select`."""

    def __init__(self) -> None:
        self.frozen: dict[str, Tensor | None] = {}  # plain name -> frozen output units (units,) bool, or None: the whole tensor
        self._kept: dict[str, Tensor] = {}

    def freeze(self, model: nn.Module, anatomy: Anatomy, pieces: Iterable[Piece]) -> None:
        """Freeze these pieces and nothing else that was trainable."""
        wanted: dict[str, set[str]] = {}
        for name, piece in pieces:
            wanted.setdefault(name, set()).add(piece)
        self.frozen, self._kept = {}, {}
        self._transposed = {plain_name(n) for n, _ in model.named_parameters() if in_out(model, n)}
        for name, p in model.named_parameters():
            if (key := plain_name(name)) not in wanted:
                continue
            part, names = anatomy.parts[key], wanted[key]
            whole = "" in names or names >= part.rows.keys() or not p.requires_grad
            p.requires_grad_(p.requires_grad and not whole)
            self.frozen[key] = None if whole else units(part, names)
        if missing := wanted.keys() - self.frozen.keys():
            raise RuntimeError(f"not found in the model: {sorted(missing)[:3]}")

    def _partial(self, named: Named) -> Iterable[tuple[str, nn.Parameter, Tensor, bool]]:
        for name, p in named:
            units = self.frozen.get(name)
            if units is not None:
                transposed = name in self._transposed
                yield name, p, units if transposed else _shard_units(p, units), transposed

    @property
    def edits(self) -> bool:
        return any(u is not None for u in self.frozen.values())

    def on_gradients(self, named: Named) -> None:
        for name, p, units, transposed in self._partial(named):
            if p.grad is not None:
                where = _index(units, dist.local(p), transposed)
                dist.local(p.grad)[where] = 0
                if name not in self._kept:
                    self._kept[name] = dist.local(p.detach())[where].clone()

    def after_step(self, named: Named) -> None:
        with torch.no_grad():
            for name, p, units, transposed in self._partial(named):
                if name in self._kept:
                    w = dist.local(p)
                    w[_index(units, w, transposed)] = self._kept[name]

    def liveness(self, moved: dict[str, Tensor]) -> str:
        wrong: list[str] = []  # frozen, and moved
        free: list[str] = []  # not frozen, or only in part, and moved there
        for name, units_moved in moved.items():
            if name not in self.frozen:
                held = torch.zeros_like(units_moved)
            else:
                units = self.frozen[name]
                held = torch.ones_like(units_moved) if units is None else units.to(units_moved.device)
            if bool((units_moved & held).any()):
                wrong.append(name)
            if bool((units_moved & ~held).any()):
                free.append(name)
        if wrong or not free:
            raise RuntimeError(f"{self.name}: {len(wrong)} frozen tensors moved ({', '.join(wrong[:3])}), {len(free)} others moved")
        whole = sum(units is None for units in self.frozen.values())
        parts = f" and pieces of {len(self.frozen) - whole}" if len(self.frozen) > whole else ""
        return f"{self.name}: {whole} of {len(moved)} tensors{parts} frozen, 0 of them moved; {len(free)} others moved"

    def fraction(self, anatomy: Anatomy) -> float:
        """Trainable share of the parameters that lie in blocks."""
        frozen = sum(anatomy.parts[n].size * (1.0 if f is None else float(f.float().mean())) for n, f in self.frozen.items())
        return 1 - frozen / sum(p.size for p in anatomy if p.layer is not None)


def _index(units: Tensor, w: Tensor, transposed: bool) -> tuple:
    if transposed:
        return (slice(None), units)
    return (units.view(w.shape[:2]),) if w.dim() == 3 else (units,)


def _shard_units(p: nn.Parameter, units: Tensor) -> Tensor:
    per = len(units) // p.shape[0]
    return dist.rows_of(p, units.view(p.shape[0], per)).reshape(-1)


def units(part: Part, pieces: Iterable[str]) -> Tensor:
    """Which output units of a fused parameter belong to these pieces; experts one after another. (units,) bool."""
    out = part.shape[-1] if part.orientation == "in_out" else part.shape[-2] if len(part.shape) > 1 else part.shape[0]
    found = torch.zeros(out, dtype=torch.bool)
    for piece in pieces:
        for s in part.rows[piece]:
            found[s] = True
    return found.repeat(part.shape[0]) if part.orientation == "experts" else found


def pieces_of(block: Block, group: str) -> dict[str, list[Piece]]:
    """The matrices of one group of a block by name, each with its bias: attention q k v o, ffn gate up down, norms.

    group: attn, cross, ffn, expert, shared or norm. A piece of a fused tensor is named by the tensor and the piece.
    """
    found: dict[str, list[Piece]] = {}
    for part in block.parts.values():
        family, _, what = part.role.partition(".")
        if family != group or what == "router":
            continue
        for name in part.rows or [what]:
            found.setdefault(name, []).append((part.name, name if part.rows else ""))
    return found


def size_of(anatomy: Anatomy, pieces: Iterable[Piece]) -> int:
    """Parameters in some pieces."""
    total = 0
    for name, piece in pieces:
        part = anatomy.parts[name]
        share = float(units(part, [piece]).float().mean()) if piece else 1.0
        total += round(part.size * share)
    return total


def halves(anatomy: Anatomy, seed: int, granularity: str = "category", balance: str = "count") -> list[Piece]:
    """Half of the matrices of every block, drawn by lot (HFT, 2404.18466): the pieces to freeze.

    category: in each block 2 of the 4 attention matrices, 2 of the 3 FFN matrices in a random half of the blocks and 1 of 3
    in the others, half of the norms. layer: all of a random half of the blocks. model: a random half of all matrices.
    balance "params" draws only among the choices whose parameter count is nearest to half, which matters for GQA.
    """
    rng = torch.Generator().manual_seed(seed)
    blocks = anatomy.blocks
    groups = [[pieces_of(b, g) for g in ("attn", "cross", "ffn", "expert", "shared", "norm")] for b in blocks]
    if granularity == "layer":
        chosen = torch.randperm(len(blocks), generator=rng)[: len(blocks) // 2].tolist()
        return [p for i in chosen for g in groups[i] for piece in g.values() for p in piece]
    if granularity == "model":
        every = [piece for g in groups for category in g for piece in category.values()]
        return [p for i in torch.randperm(len(every), generator=rng)[: len(every) // 2].tolist() for p in every[i]]
    found: list[Piece] = []
    heavy = set(torch.randperm(len(blocks), generator=rng)[: len(blocks) // 2].tolist())  # 2 of 3 FFN matrices
    for i, categories in enumerate(groups):
        for category in categories:
            n = len(category)
            if n:
                freeze = n // 2 + (n % 2 and i in heavy)
                found += [p for name in _draw(anatomy, category, freeze, balance, rng) for p in category[name]]
    return found


def _draw(anatomy: Anatomy, category: dict[str, list[Piece]], n: int, balance: str, rng: torch.Generator) -> tuple[str, ...]:
    choices = list(combinations(category, n))
    if balance == "params":
        sizes = {k: size_of(anatomy, v) for k, v in category.items()}
        aim = sum(sizes.values()) * n / len(category)
        off = [abs(sum(sizes[k] for k in c) - aim) for c in choices]
        choices = [c for c, o in zip(choices, off, strict=True) if o == min(off)]
    return choices[int(torch.randint(len(choices), (), generator=rng))]


def memory(anatomy: Anatomy, part: str) -> list[Piece]:
    """Keys or values of every dense feed-forward memory (2402.12233), with their biases.

    part: keys (all matrices before the activation), gate, up, or values. UserError where the model has no such matrix.
    """
    wanted = {"keys": ("gate", "up"), "gate": ("gate",), "up": ("up",), "values": ("down",)}[part]
    found = [p for b in anatomy.blocks for g in ("ffn", "expert") for n, ps in pieces_of(b, g).items() if n in wanted for p in ps]
    if not found:
        raise UserError(f"part={part}: {type(anatomy.model).__name__} has no such matrix", "its feed-forward part has no gate", "use keys")
    return found
