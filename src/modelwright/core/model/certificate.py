"""The certificate: what a step did to a model, measured on a probe text, before and after.

Logits and losses are computed in fp32 whatever the stored type, so that a difference is the method's and not the
rounding's. Where the two models do not fit in memory the certificate says so and vouches for the structure only.
"""

import gc
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint, check_vocabulary
from modelwright.core.model.classes import positions

PROBE = Path(__file__).parents[2] / "data" / "probe.txt"
TOLERANCE = 1e-4
_PROBE_TOKENS, _PROBE_ROWS = 256, 2
_BIG = 50_000_000


@dataclass(frozen=True)
class Size:
    """What a model costs."""

    params_total: int
    params_active: int
    flops_per_token: int  # forward, attending to `context` tokens
    kv_bytes_per_token: int
    context: int

    @staticmethod
    def of(anatomy: Anatomy, itemsize: int) -> "Size":
        context = int(getattr(anatomy.config, "max_position_embeddings", None) or getattr(anatomy.config, "n_positions", 0) or 512)
        return Size(anatomy.total(), anatomy.active(), anatomy.flops_per_token(context), anatomy.kv_bytes_per_token(itemsize), context)


@dataclass(frozen=True)
class Certificate:
    """Before and after. `passed` is None when nothing was promised; `max_abs_dlogit` is None when logits were not compared."""

    promise: str  # same function | changed function | trained | another kind of model
    passed: bool | None
    max_abs_dlogit: float | None
    tolerance: float | None
    loss_before: float | None  # nats per predicted token of the probe
    loss_after: float | None
    bits_per_byte_before: float | None
    bits_per_byte_after: float | None
    params_total: int
    params_active: int
    flops_per_token: int
    kv_bytes_per_token: int
    loads_in: str
    before: dict[str, int] = field(default_factory=dict)
    probe: str = ""
    note: str = ""
    samples: list[list[str]] = field(default_factory=list)  # a prompt, and how each model goes on

    def rows(self) -> list[tuple[str, str, str]]:
        """(quantity, before, after) for tables."""
        b, rows = self.before, []
        for name, old, new in (
            ("parameters", b["params_total"], self.params_total),
            ("active per token", b["params_active"], self.params_active),
            ("forward FLOPs per token", b["flops_per_token"], self.flops_per_token),
            ("KV cache bytes per token", b["kv_bytes_per_token"], self.kv_bytes_per_token),
        ):
            rows.append((name, f"{old:,}", f"{new:,}"))
        for name, old_loss, new_loss in (
            ("probe loss (nats per token)", self.loss_before, self.loss_after),
            ("probe bits per byte", self.bits_per_byte_before, self.bits_per_byte_after),
        ):
            if new_loss is not None:
                rows.append((name, f"{old_loss:.4f}", f"{new_loss:.4f}"))
        if self.max_abs_dlogit is not None and self.promise != "trained":
            rows.append(("largest logit difference", "", f"{self.max_abs_dlogit:.2e}"))
        return rows

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def probe_ids(checkpoint: Checkpoint, text: Path = PROBE) -> tuple[Tensor, int, str]:
    """Token ids (B, T) to measure on, the bytes they stand for (0: unknown), and what they are."""
    vocab = int(checkpoint.hf_config.get_text_config().vocab_size)
    tokenizer = checkpoint.tokenizer()
    check_vocabulary(tokenizer, vocab, checkpoint.folder)
    if tokenizer is None:
        ids = torch.randint(0, vocab, (_PROBE_ROWS, 64), generator=torch.Generator().manual_seed(0))
        return ids, 0, "random token ids (no tokenizer beside the weights)"
    whole = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    limit = positions(checkpoint.skeleton) or 512
    width = min(_PROBE_TOKENS, limit, len(whole) // _PROBE_ROWS)
    ids = torch.tensor(whole[: _PROBE_ROWS * width]).view(_PROBE_ROWS, width)
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    return ids, size, f"{ids.numel()} tokens of {text.name}"


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits (B, T, V) in fp32, evaluation mode; the model's mode is put back."""
    training = model.training
    model.eval()
    inputs = {"input_ids": ids.to(model.device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    logits = model(**inputs).logits.float().cpu()
    model.train(training)
    return logits


def nats(logits: Tensor, ids: Tensor) -> float:
    """Mean next-token loss."""
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def certify(
    before: Checkpoint,
    after: Checkpoint,
    promise: str = "same function",
    text: Path = PROBE,
    mode: str = "auto",
    prompts: list[list[int]] | None = None,
) -> Certificate:
    """Compare two saved checkpoints, each loaded in a fresh object through its stock class; let both go on from `prompts`.

    mode: 'auto' compares logits when the larger model fits in memory, 'full' always, 'structure' never.
    """
    sizes, cls = {}, ""
    for key, ckpt in (("before", before), ("after", after)):
        anatomy = Anatomy(ckpt.skeleton)
        sizes[key], cls = Size.of(anatomy, max(ckpt.dtype(n).itemsize for n in ckpt.table)), type(ckpt.skeleton).__name__
    need, free = 4.8 * max(s.params_total for s in sizes.values()), psutil.virtual_memory().available
    measured: dict[str, Any] = dict.fromkeys(
        ("max_abs_dlogit", "tolerance", "loss_before", "loss_after", "bits_per_byte_before", "bits_per_byte_after")
    )
    passed, probe, note = None, "", ""
    if promise == "another kind of model":
        after.model()  # every tensor is there and finite, or this raises
        note = "the result gives other outputs than its source: they were not compared"
    elif mode == "structure" or mode == "auto" and need > free:
        note = "names, shapes and types fit the stock class; logits were not compared" + (
            f": that needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free" if mode == "auto" else ", as asked"
        )
    else:
        ids, size, probe = probe_ids(before, text)
        vocab = int(after.hf_config.get_text_config().vocab_size)
        if int(ids.max()) >= vocab:
            raise UserError("the two models have different vocabularies", f"the probe uses id {int(ids.max())} and the second has {vocab}")
        model, said = before.model(torch.float32), []
        old = logits_of(model, ids)
        said.append(continuations(model, prompts or []))
        del model
        if sizes["before"].params_total > _BIG:  # modules hold cycles; a small model may wait for the collector
            gc.collect()
        model = after.model(torch.float32)
        new = logits_of(model, ids)
        said.append(continuations(model, prompts or []))
        shared = min(old.shape[-1], new.shape[-1])
        difference = float((old[..., :shared] - new[..., :shared]).abs().max())
        tolerance = TOLERANCE * max(1.0, float(old.abs().max()) / 10)  # fp32 rounding grows with the logits
        losses = (nats(old, ids), nats(new, ids)) if cls.endswith(("ForCausalLM", "LMHeadModel")) else (None, None)
        per_byte = [n * (ids.shape[1] - 1) * len(ids) / size / math.log(2) if size and n is not None else None for n in losses]
        measured = {
            "max_abs_dlogit": difference,
            "tolerance": tolerance,
            "loss_before": losses[0],
            "loss_after": losses[1],
            "bits_per_byte_before": per_byte[0],
            "bits_per_byte_after": per_byte[1],
            "samples": _samples(after.tokenizer(), prompts or [], said),
        }
        passed = bool(difference <= tolerance) if promise == "same function" else None
        if not math.isfinite(difference):
            passed, note = False, "the new model's logits are not finite"
    after_size = {k: v for k, v in asdict(sizes["after"]).items() if k != "context"}
    return Certificate(
        promise=promise, passed=passed, **measured, **after_size, loads_in=cls, before=asdict(sizes["before"]), probe=probe, note=note
    )


@torch.no_grad()
def continuations(model: Any, prompts: list[list[int]], tokens: int = 40) -> list[list[int]]:
    """What a model says after each prompt, greedily; empty where it cannot generate."""
    if not prompts or not model.can_generate() or model.config.is_encoder_decoder:
        return [[] for _ in prompts]
    model.eval()
    found: list[list[int]] = []
    for p in prompts:
        if max(p) >= int(model.config.get_text_config().vocab_size):  # a token that this model does not know
            found.append([])
            continue
        ids = torch.tensor([p], device=model.device)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=0)
        found.append(made[0, len(p) :].tolist())
    return found


def _samples(tokenizer: Any, prompts: list[list[int]], said: list[list[list[int]]]) -> list[list[str]]:
    if tokenizer is None:
        return []
    return [[tokenizer.decode(ids) for ids in row] for row in zip(prompts, *said, strict=True)]


def require_same_when_reloaded(model: Any, saved: Checkpoint) -> float:
    """The largest logit difference between a model in memory, in the types it was saved in, and what a fresh object loads from disk.

    Both are computed in fp32, so that the order of sums in 16 bits does not show. Raises RuntimeError when the difference is real.
    """
    ids = probe_ids(saved)[0]
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    drift = float((logits_of(model.float(), ids) - logits_of(saved.model(torch.float32).to(model.device), ids)).abs().max())
    for n, p in model.named_parameters():
        p.data = p.data.to(kinds[n])
    if not drift <= 1e-3:
        raise RuntimeError(f"the saved model differs from the one in memory by {drift:.1e} in its logits")
    return drift


def require_same_weights(model: Any, saved: Checkpoint) -> None:
    """RuntimeError unless what a fresh object loads from disk has the weights of the model in memory, bit for bit."""
    held, found = dict(model.named_parameters()), dict(saved.model().named_parameters())
    wrong = [n for n in held.keys() | found.keys() if n not in held or n not in found or not torch.equal(held[n].cpu(), found[n])]
    if wrong:
        raise RuntimeError(f"the saved model differs from the one in memory in {min(wrong)}")
