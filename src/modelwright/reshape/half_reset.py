"""Half-reset: give a tuned model half of its pre-trained matrices back (the pilot study of HFT, arXiv 2404.18466).

After full fine-tuning, half of the matrices are reset to their values before it, which recovers base knowledge and keeps
most of the new ability: theta = M o theta_tuned + (1 - M) o theta_base, M constant on matrices and drawn as in tune.hft.
Ours: works on any two checkpoints of one shape; share 0 and 1 give the tuned and the base model exactly.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Built
from modelwright.core.train.freeze import halves, units


@dataclass(frozen=True)
class Knobs:
    pretrained: str = knob(help="checkpoint whose values come back", path=True)
    what: Literal["half", "none", "all"] = knob("half", "reset half of the matrices of each block, nothing, or every weight")
    granularity: Literal["category", "layer", "model"] = knob("category", "half of what")
    balance: Literal["count", "params"] = knob("count", "halve the number of matrices, or choose among halves by parameters")


def half_reset(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Built, str]:
    """The tuned model `source` with pieces of `knobs.pretrained`; facts hold the share that was reset."""
    model, base = source.model(), Checkpoint(knobs.pretrained).model()
    anatomy, old = Anatomy(model), dict(base.named_parameters())
    if {n: p.shape for n, p in model.named_parameters()} != {n: p.shape for n, p in old.items()}:
        raise UserError(
            f"{knobs.pretrained} has other weights than the model", "names or shapes differ", "give the model it was tuned from"
        )
    pieces = {"all": [(p.name, "") for p in anatomy], "none": []}.get(knobs.what)
    if pieces is None:
        pieces = halves(anatomy, seed, knobs.granularity, knobs.balance)
    changed = 0
    with torch.no_grad():
        for name, piece in pieces:
            part, new, was = anatomy.parts[name], model.get_parameter(name), old[name]
            if not piece:
                new.copy_(was)
                changed += part.size
                continue
            which: Any = units(part, [piece])
            at = (slice(None), which) if part.orientation == "in_out" else which.view(new.shape[:2]) if new.dim() == 3 else which
            new[at] = was[at]
            changed += new[at].numel()
    return Built(model, None, source, {"reset share": changed / anatomy.total(), "pieces": len(pieces)}), "changed function"


METHOD = half_reset
