"""What a model generates for pairs, beside what was wanted: BLEU and chrF of sacrebleu, exact matches."""

from typing import Any

import torch

from modelwright.core.errors import UserError
from modelwright.tune.spans.whitespace import Spaces, decode, write


def require_sacrebleu() -> None:
    """UserError where sacrebleu is not installed."""
    from importlib.util import find_spec

    if find_spec("sacrebleu") is None:
        raise UserError("scoring generated text needs sacrebleu", "it is not installed", "pip install 'modelwright[translation]'")


def score(said: list[str], wanted: list[str]) -> dict[str, float]:
    """Corpus BLEU and chrF, 0 to 100, and the share of exact matches in %."""
    require_sacrebleu()
    import sacrebleu

    exact = 100 * sum(a.strip() == b.strip() for a, b in zip(said, wanted, strict=True)) / max(len(wanted), 1)
    return {
        "bleu": float(sacrebleu.corpus_bleu(said, [wanted]).score),
        "chrf": float(sacrebleu.corpus_chrf(said, [wanted]).score),
        "exact": exact,
    }


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: list[str], *, spaces: Spaces = "indent", beams: int = 3, most: int = 1024, batch: int = 16
) -> list[str]:
    """The model's answers, beam search with length penalty 0."""
    training, said = model.training, []
    model.eval()
    for i in range(0, len(prompts), batch):
        texts = [write(p, spaces) for p in prompts[i : i + batch]]
        given = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=most)
        out = model.generate(
            input_ids=given["input_ids"].to(model.device),
            attention_mask=given["attention_mask"].to(model.device),
            num_beams=beams,
            length_penalty=0.0,
            max_new_tokens=most,
        )
        said += [decode(tokenizer, row) for row in out.tolist()]
    model.train(training)
    return said
