"""Edit one fact by gradient on the keys or the values of one layer (Tuning keys vs values, arXiv 2402.12233).

FFN(h) = f(h K^T) V. Only K (keys: gate and up where there is a gate) or only V (values) of one layer moves, until the new
object is likelier than `confidence` after the prompt; the paper finds that keys generalise better and disturb less.
Scores, as in the paper: efficacy P(new) > P(true) on the prompt, paraphrase the same on rewordings, locality P(true) >
P(new) on neighbouring subjects, score their harmonic mean.

The paper's editing code was not released (GPT-J, GPT2-XL; tables not readable): steps, learning rate and the stop are ours.
`norm` projects each weight back to within that maximal change, the paper's constrained variant.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.model.writer import Built
from modelwright.core.train.freeze import memory, units


@dataclass(frozen=True)
class Knobs:
    fact: str = knob(help="json file: prompt, new, true, and lists paraphrases and neighbours of prompts", path=True)
    layer: int | None = knob(None, "block whose memories are edited; empty: the middle one", low=0)
    part: Literal["keys", "gate", "up", "values"] = knob("keys", "what may move")
    lr: float = knob(5e-4, "Adam's learning rate", low=0)
    steps: int = knob(50, "steps at most", low=1)
    confidence: float = knob(0.9, "stop when the new object is this likely", low=0, high=1)
    norm: float = knob(0.0, "largest change of any weight; 0: no limit", low=0)


_KEYS = ("prompt", "new", "true", "paraphrases", "neighbours")


def edit(source: Checkpoint, knobs: Knobs, seed: int = 0) -> tuple[Built, str]:
    """The model with the fact edited in; facts hold the scores before and after."""
    model, tokenizer, fact = source.model(), source.tokenizer(), read_fact(Path(knobs.fact))
    if tokenizer is None:
        raise UserError("the checkpoint has no tokenizer", "facts are text", "add tokenizer files")
    stored, before = model.dtype, scores(model, tokenizer, fact)
    learnt = learn(model.float(), tokenizer, fact, knobs)
    for p in model.parameters():  # rounding may undo a part: it is the rounded model that is scored; buffers keep their type
        p.data = p.data.to(stored)
    facts = {"before": before, "after": scores(model, tokenizer, fact), **learnt, "layer": _layer(model, knobs)}
    return Built(model, None, source, facts), "changed function"


def read_fact(file: Path) -> dict[str, Any]:
    """The request; UserError for what is missing."""
    try:
        fact = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"{file} is no json object", "it must hold prompt, new and true", "see `modelwright show reshape.edit`") from None
    for key in ("prompt", "new", "true"):
        if not isinstance(fact, dict) or not isinstance(fact.get(key), str) or not fact[key]:
            raise UserError(f"{file} has no '{key}'", "prompt, new and true are texts", "add it")
    for key, value in fact.items():
        if key not in _KEYS:
            raise UserError(f"{file} has an unknown '{key}'", how=did_you_mean(key, _KEYS))
        if key in _KEYS[3:] and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            raise UserError(f"{file} has wrong {key}", "they are a list of prompts", "write a list of texts")
    return {"paraphrases": [], "neighbours": []} | fact


def _layer(model: Any, knobs: Knobs) -> int:
    n = len(Anatomy(model).blocks)
    if knobs.layer is not None and knobs.layer >= n:
        raise UserError(f"layer={knobs.layer} but the model has {n} blocks", how=f"choose 0 to {n - 1}")
    return n // 2 if knobs.layer is None else knobs.layer


def log_likelihood(model: Any, tokenizer: Any, prompts: list[str], answer: str) -> Tensor:
    """Summed log-probability of `answer` after each prompt, (N,); differentiable."""
    heads = tokenizer([p.rstrip() for p in prompts])["input_ids"]
    wholes = tokenizer([f"{p.rstrip()} {answer.strip()}" for p in prompts])["input_ids"]
    ids = torch.zeros(len(wholes), max(map(len, wholes)), dtype=torch.long)
    mask, learnt = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (head, whole) in enumerate(zip(heads, wholes, strict=True)):
        n, begins = len(whole), len(os.path.commonprefix([head, whole]))
        ids[i, :n], mask[i, :n], learnt[i, begins:n] = torch.tensor(whole), 1, True
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits[:, :-1].float()
    each = -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(model.device), reduction="none").view(len(wholes), -1)
    return (each * learnt[:, 1:].to(model.device)).sum(1)


def learn(model: Any, tokenizer: Any, fact: dict[str, Any], knobs: Knobs) -> dict[str, Any]:
    """Move the chosen matrices of one layer in place; every other weight, and the other rows of a fused one, stay."""
    anatomy = Anatomy(model)
    path = anatomy.blocks[_layer(model, knobs)].path + "."
    pieces = [p for p in memory(anatomy, knobs.part) if p[0].startswith(path)]
    wanted: dict[str, set[str]] = {}
    for name, piece in pieces:
        wanted.setdefault(name, set()).add(piece)
    model.eval().requires_grad_(False)
    moving = []
    for name, names in wanted.items():
        part, p = anatomy.parts[name], model.get_parameter(name).requires_grad_(True)
        free = torch.ones(1, dtype=torch.bool) if "" in names else units(part, names)
        shape = (1, -1) if part.orientation == "in_out" else (*p.shape[:2], 1) if p.dim() == 3 and len(free) > 1 else (-1, 1)
        moving.append((p, p.detach().clone(), free.view(shape) if p.dim() > 1 else free))
    optimizer = torch.optim.Adam([p for p, _, _ in moving], lr=knobs.lr)
    step = 0
    for step in range(1, knobs.steps + 1):
        loss = -log_likelihood(model, tokenizer, [fact["prompt"]], fact["new"]).sum()
        if float(torch.exp(-loss.detach())) >= knobs.confidence:
            step -= 1
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, old, free in moving:
                delta = torch.where(free, p - old, 0)
                p.copy_(old + (delta.clamp(-knobs.norm, knobs.norm) if knobs.norm else delta))
    model.requires_grad_(True)
    return {"steps": step, "moved weights": sum(int((p != old).sum()) for p, old, _ in moving)}


@torch.no_grad()
def scores(model: Any, tokenizer: Any, fact: dict[str, Any]) -> dict[str, float]:
    """efficacy, paraphrase, locality (shares) and their harmonic mean; groups without prompts are left out."""
    model.eval()
    found = {}
    for name, prompts in (("efficacy", [fact["prompt"]]), ("paraphrase", fact["paraphrases"]), ("locality", fact["neighbours"])):
        if prompts:
            new, true = (log_likelihood(model, tokenizer, prompts, fact[k]) for k in ("new", "true"))
            found[name] = float(((true > new) if name == "locality" else (new > true)).float().mean())
    mean = len(found) / sum(1 / v for v in found.values()) if min(found.values()) > 0 else 0.0
    return found | {"score": mean}


METHOD = edit
