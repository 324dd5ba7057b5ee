"""What a tokenizer costs each language: tokens per word and per byte, and the premium over the pivot on parallel text."""

from typing import Any


def token_costs(tokenizer: Any, sentences: list[str]) -> dict[str, float]:
    """Counts over sentences: words are what stands between spaces. A token continues a word where it is not the word's first."""
    words = [w for s in sentences for w in s.split()]
    ids = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in sentences]
    alone = [tokenizer((" " if i else "") + w, add_special_tokens=False)["input_ids"] for s in sentences for i, w in enumerate(s.split())]
    tokens, size = sum(map(len, ids)), sum(len(s.encode()) for s in sentences)
    pieces = [t for row in ids for t in tokenizer.convert_ids_to_tokens(row)]
    back = [tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in ids]
    return {
        "sentences": len(sentences),
        "words": len(words),
        "bytes": size,
        "tokens": tokens,
        "fertility": tokens / max(len(words), 1),
        "tokens_per_byte": tokens / max(size, 1),
        "continued_words": sum(len(a) > 1 for a in alone) / max(len(words), 1),
        "unknown": sum(t == tokenizer.unk_token_id for row in ids for t in row) / max(tokens, 1),
        "byte_fallback": sum(len(p) == 6 and p.startswith("<0x") for p in pieces) / max(tokens, 1),
        "not_the_same_when_decoded": sum(a.strip() != b.strip() for a, b in zip(sentences, back, strict=True)),
    }


def premiums(costs: dict[str, dict[str, float]], pivot: str) -> dict[str, float]:
    """tokens(language) / tokens(pivot) on the same sentences."""
    return {k: c["tokens"] / costs[pivot]["tokens"] for k, c in costs.items()}
