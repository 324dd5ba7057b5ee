"""RM-Bench (arXiv 2410.16184): are subtle errors seen whatever the style?

A row per prompt: score_chosen and score_rejected, three scores each, by style: concise, detailed, detailed with markdown;
the texts in chosen and rejected, or in the suite's own data given as `texts` (joined by domain and id). All nine
comparisons count. Hard: the rejected answer has more style; normal: the same; easy: less. The score is the mean of the
domains, safety being the mean of refuse and response. A file per domain (its name up to the first "_"), or rows with `domain`.
"""

from pathlib import Path

import numpy as np

from modelwright.core.errors import UserError
from modelwright.reward.suites.common import Case, Texts, counted, files, mean_of, text_of, texts
from modelwright.reward.table.evidence import Heads
from modelwright.reward.table.scores import Scores, Source, finite, unique

ROLES = ("score_chosen", "score_rejected", "chosen", "rejected", "domain", "id")
LEVELS = ("easy", "normal", "hard")
CHOSEN, REJECTED = np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3)  # styles of the nine comparisons
LEVEL = [LEVELS[1 + step] for step in np.sign(REJECTED - CHOSEN)]


def rmbench(path: Path, features: list[str], columns: dict[str, str], text_path: str | None) -> list[Case]:
    """One case over all domains."""
    known = texts(text_path, "domain")
    found = [_domain(name, file, features, columns, known) for name, file in files(path)]
    domains = [d for part in found for d in part[0]]
    n, row = len(domains), 6 * np.arange(len(domains))[:, None]
    parts, part = np.unique([f"{d} {level}" for d in domains for level in LEVEL], return_inverse=True)
    score = np.concatenate([p[1] for p in found]).ravel()
    lengths = {f: np.concatenate([p[2][f] for p in found]).ravel() for f in features}
    better, worse = (row + CHOSEN).ravel(), (row + 3 + REJECTED).ravel()
    s = Scores(path.name, score, lengths, np.repeat(np.arange(n), 6), better, worse, part, parts.tolist())
    return [(s, heads(list(dict.fromkeys(domains))))]


def heads(domains: list[str]) -> Heads:
    """The score, the domains, and each level over the domains."""
    kinds = {k: [d for d in domains if d.split("-")[0] == k] for k in dict.fromkeys(d.split("-")[0] for d in domains)}
    by_domain = {k: {f"{d} {level}": 1.0 for d in of for level in LEVELS} for k, of in kinds.items()}
    by_level = {level: mean_of([{f"{d} {level}": 1.0 for d in of} for of in kinds.values()]) for level in LEVELS}
    return {"accuracy": mean_of(list(by_domain.values())), **by_domain, **by_level}


def _domain(
    name: str, file: Path, features: list[str], columns: dict[str, str], known: Texts
) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """Domain of each row (n), scores (n, 6), features (n, 6): three chosen, three rejected."""
    source = Source(file, columns, roles=ROLES)
    for side in ("score_chosen", "score_rejected"):
        values = source.get(side)
        if bad := [i for i, v in enumerate(values) if not isinstance(v, list) or len(v) != 3]:
            raise UserError(f"row {bad[0] + 1} of {file} has no three scores in '{side}'", "RM-Bench has three styles")
    rows = [[*a, *b] for a, b in zip(source.get("score_chosen"), source.get("score_rejected"), strict=True)]
    score = np.stack([finite([r[i] for r in rows], f"the scores in {file}") for i in range(6)], 1)
    domain = [str(d) for d in source.get("domain")] if source.has("domain") else [Path(name).name.split("_")[0]] * len(rows)
    if source.has("id"):
        unique(source, "id", domain)
    if known:
        both = [text_of(known, key, file) for key in zip(domain, map(str, source.get("id")), strict=True)]
        words = [[*t["chosen"], *t["rejected"]] for t in both]
    else:
        words = [[*a, *b] for a, b in zip(source.get("chosen"), source.get("rejected"), strict=True)]
    return domain, score, {f: np.stack([counted([w[i] for w in words], f, file) for i in range(6)], 1) for f in features}
