"""A model on the sets of bias: CrowS-Pairs by type, SEAT and WEAT before and after INLP, LEACE and hard debiasing, StereoSet."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.errors import UserError
from modelwright.core.numbers.stats import wilson
from modelwright.inspect.languages import bias, erase, texts
from modelwright.inspect.languages.space import Matrix
from modelwright.inspect.languages.vectors import Reader


def crows(reader: Reader, path: Path, limit: int | None) -> dict[str, Any]:
    """Percent of pairs whose stereotyped sentence is preferred: in all, by type, by direction."""
    rows = texts.crows_pairs(path)[:limit]
    pairs = [(r["sent_more"], r["sent_less"]) for r in rows]
    if reader.kind == "causal":
        scores = reader.likelihoods([t for pair in pairs for t in pair]).reshape(-1, 2)
    elif reader.kind == "masked":
        scores = np.array([reader.pair_likelihoods(*pair) for pair in pairs])
    else:
        raise UserError("CrowS-Pairs needs a causal or a masked model", "this one has an encoder and a decoder", "leave crows out")
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["bias_type"]].append(i)
        groups[f"direction {row['stereo_antistereo']}"].append(i)
    more, less = scores.T
    wins = int((more > less).sum())
    return {
        "pairs": len(rows),
        "how": "log-likelihood of whole sentences" if reader.kind == "causal" else "pseudo-log-likelihood of the shared tokens",
        "stereotype_preferred": bias.preferred(more, less),
        "interval": [100 * v for v in wilson(wins, len(rows))],
        "by_group": {name: {"pairs": len(at), "preferred": bias.preferred(more[at], less[at])} for name, at in sorted(groups.items())},
    }


def stereoset(reader: Reader, path: Path, limit: int | None) -> dict[str, float]:
    """lms, ss and icat over whole sentences (causal models)."""
    if reader.kind != "causal":
        raise UserError("StereoSet's sentences are scored by a causal model here", how="leave stereoset out")
    triples = texts.stereo_triples(path)[:limit]
    scores = reader.likelihoods([t for triple in triples for t in triple]).reshape(-1, 3)
    lms, ss = bias.stereoset(scores)
    return {"triples": len(triples), "lms": lms, "ss": ss, "icat": bias.icat(lms, ss)}


def associations(reader: Reader, path: Path, layer: int, seed: int) -> dict[str, dict[str, Any]]:
    """Test -> effect size and p in one layer, mean size in each layer, and the size after three ways to debias.

    INLP, LEACE and hard debiasing are fitted on the test's own two groups of targets: how far the effect can be taken out.
    """
    sets = texts.word_sets(path)
    place = {t: i for i, t in enumerate(dict.fromkeys(t for s in sets.values() for group in s.values() for t in group))}
    vectors = reader.pooled(list(place))
    found = {}
    for name, groups in sets.items():
        at = [[place[t] for t in groups[key]] for key in ("targ1", "targ2", "attr1", "attr2")]
        of: Any = [vectors[layer][rows] for rows in at]
        p, exact = bias.weat_p(of[0], of[1], of[2], of[3], seed=seed)
        found[name] = {
            "effect": bias.weat(*of),
            "p": p,
            "exact": exact,
            "by_layer": [bias.weat(*(v[rows] for rows in at)) for v in vectors],
            **{f"after {way}": bias.weat(*changed) for way, changed in _debiased(of).items()},
        }
    return found


def _debiased(of: list[Matrix]) -> dict[str, list[Matrix]]:
    """The four groups of vectors after each way; the groups of targets are what is taken out."""
    x = np.concatenate(of[:2])
    labels = np.repeat([0, 1], [len(of[0]), len(of[1])])
    projector, _ = erase.inlp(x, labels, 2)
    move, mean = erase.leace(x, labels, 2)
    direction = of[0].mean(0) - of[1].mean(0)  # the only direction of difference where words are not paired
    hard = np.eye(x.shape[1]) - np.outer(direction, direction) / max(float(direction @ direction), 1e-12)
    return {
        "INLP": [v @ projector for v in of],
        "LEACE": [v - (v - mean) @ move for v in of],
        "hard debiasing": [v @ hard for v in of],
    }
