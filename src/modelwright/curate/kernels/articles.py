"""How good extracted text is: precision and recall of 4-word shingles as the article extraction benchmark counts them.

Of each page the multiset of 4-grams of words is compared with the true text's (texts of fewer words are one shingle). Precision and
recall are means over the pages where they are defined; F1 is made from the two means; accuracy is the share of pages that are equal.
"""

import re
from collections import Counter
from statistics import mean

_WORD = re.compile(r"\w+")


def shingles(text: str) -> Counter:
    words = _WORD.findall(text or "")
    return Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)) if words)


def score(truth: dict[str, str], found: dict[str, str]) -> dict[str, float]:
    """f1, precision, recall and accuracy of texts by page."""
    precision, recall, equal = [], [], []
    for page, text in truth.items():
        a, b = shingles(text), shingles(found.get(page, ""))
        right = sum((a & b).values())
        if b:
            precision.append(right / sum(b.values()))
        if a:
            recall.append(right / sum(a.values()))
        equal.append(a == b)
    p, r = mean(precision or [0.0]), mean(recall or [0.0])
    return {"f1": 2 * p * r / (p + r) if p + r else 0.0, "precision": p, "recall": r, "accuracy": mean(equal)}
