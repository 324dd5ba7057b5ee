"""What a model makes of sentences: pooled states of every layer, and log-likelihoods. Decoders, encoders, and encoders of pairs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint

BATCH = 64


class Reader:
    """A checkpoint in evaluation mode, in fp32, with its tokenizer. `cut` counts sentences longer than its context."""

    def __init__(self, source: Checkpoint):
        tokenizer = source.tokenizer()
        if tokenizer is None:
            raise UserError(f"{source.folder} has no tokenizer", "sentences are read by it", "add its files")
        self.tokenizer: Any = tokenizer
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = source.model(torch.float32).eval().to(device)
        self.kind = "pair" if source.hf_config.is_encoder_decoder else "causal" if self._causal() else "masked"
        config = self.model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or 512)
        self.start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.cut = 0

    def _causal(self) -> bool:
        return "CausalLM" in type(self.model).__name__ or "LMHead" in type(self.model).__name__

    def ids(self, text: str) -> list[int]:
        """A sentence with what the tokenizer puts around it; a decoder's begins with a token to be conditioned on."""
        row = self.tokenizer(text)["input_ids"]
        if self.kind == "causal" and self.start is not None and row[:1] != [self.start]:
            row = [self.start, *row]
        self.cut += len(row) > self.context
        return row[: self.context]

    def batches(self, texts: list[str]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(places, ids, mask), short sentences first, padded on the right."""
        rows = [self.ids(t) for t in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            width = max(1, *(len(rows[i]) for i in places))
            ids = torch.zeros(len(places), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for j, i in enumerate(places):
                ids[j, : len(rows[i])] = torch.tensor(rows[i], dtype=torch.long)
                mask[j, : len(rows[i])] = 1
            yield places, ids.to(self.model.device), mask.to(self.model.device)

    @torch.inference_mode()
    def pooled(self, texts: list[str]) -> np.ndarray:
        """(layers + 1, n, d): the mean state of each sentence's tokens after the embeddings and after each block."""
        body = self.model.get_encoder() if self.kind == "pair" else self.model.base_model
        found: list[np.ndarray] = []
        places: list[int] = []
        for at, ids, mask in self.batches(texts):
            states = body(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            share = (mask / mask.sum(1, keepdim=True).clamp(min=1))[..., None].float()  # (B, T, 1)
            found.append(torch.stack([(s.float() * share).sum(1) for s in states]).cpu().double().numpy())
            places += at
        whole = np.concatenate(found, 1)
        return whole[:, np.argsort(places)]

    @torch.inference_mode()
    def likelihoods(self, texts: list[str]) -> np.ndarray:
        """Sum of log-probabilities of each sentence's tokens given those before (causal models)."""
        found = np.zeros(len(texts))
        for at, ids, mask in self.batches(texts):
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
            found[at] = chosen.double().sum(1).cpu().numpy()
        return found

    @torch.inference_mode()
    def pair_likelihoods(self, more: str, less: str) -> tuple[float, float]:
        """Pseudo-log-likelihoods over the tokens that two sentences share, one masked at a time (masked models)."""
        rows = [self.ids(t) for t in (more, less)]
        special = set(self.tokenizer.all_special_ids)
        blocks = SequenceMatcher(None, rows[0], rows[1], autojunk=False).get_matching_blocks()
        shared = [(b.a + k, b.b + k) for b in blocks for k in range(b.size) if rows[0][b.a + k] not in special]
        totals = []
        for side, row in enumerate(rows):
            places = [pair[side] for pair in shared]
            ids = torch.tensor([row] * len(places), device=self.model.device)
            ids[range(len(places)), places] = self.tokenizer.mask_token_id
            total = 0.0
            for part, at in zip(ids.split(BATCH), torch.tensor(places).split(BATCH), strict=True):
                logits = self.model(input_ids=part).logits[range(len(part)), at].float().log_softmax(-1)
                total += float(logits[range(len(part)), [row[p] for p in at.tolist()]].double().sum())
            totals.append(total)
        return totals[0], totals[1]

    def loss(self, texts: list[str]) -> float:
        """Nats per token over sentences."""
        count = sum(len(self.ids(t)) - 1 for t in texts)
        return float(-self.likelihoods(texts).sum() / max(count, 1))

    @contextmanager
    def changed(self, block: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Change the states that a block gives out."""

        def hook(_: Any, args: Any, out: Any) -> Any:
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        handle = Anatomy(self.model).blocks[block].module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
