"""Tables and pictures of inspect.experts."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from modelwright.inspect.mixture.advice import Advice, mean_pair
from modelwright.inspect.mixture.layers import KINDS
from modelwright.inspect.mixture.outputs import LayerOutputs
from modelwright.inspect.mixture.weights import Match, WeightSimilarity
from modelwright.moe.watch import load_plot

T = TypeVar("T")

_MAPS = 6  # layers whose similarity maps are drawn
_WIDE = 32  # members that a map shows


def spread_out(indices: list[T], most: int) -> list[T]:
    """At most `most` of the list, the ends included."""
    if len(indices) <= most:
        return indices
    return [indices[round(i * (len(indices) - 1) / (most - 1))] for i in range(most)]


def shown(value: float | None, digits: int = 3) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def map_plot(title: str, members: list[str], table: Tensor) -> dict[str, Any]:
    """A similarity map; cosines below 0 are drawn as 0 and said in full in the numbers."""
    names = members[:_WIDE]
    values = [[None if math.isnan(v) else max(v, 0.0) for v in row[: len(names)]] for row in table.tolist()[: len(names)]]
    note = "" if len(members) <= _WIDE else f"the first {_WIDE} of {len(members)}"
    return {"kind": "heat", "title": title, "x": "", "y": "", "columns": names, "rows": names, "values": values, "note": note}


def weight_table(found: dict[int, WeightSimilarity]) -> dict[str, Any]:
    """S1, S2 and S4, one row per layer: means over pairs of experts."""
    rows = []
    for index, w in found.items():
        e = len(w.pca["gate"])
        rows.append(
            [str(index)]
            + [shown(mean_pair(w.matrix[k], e)) for k in KINDS]
            + [shown(mean_pair(w.neuron[k], e)) for k in KINDS]
            + [shown(w.r2[k], 2) for k in KINDS]
        )
    columns = ["layer", *(f"{k} matrix" for k in KINDS), *(f"{k} mean neuron" for k in KINDS), *(f"router r2, {k}" for k in KINDS)]
    return {"title": "Weights: mean cosine over pairs of experts", "columns": columns, "rows": rows}


def member_table(found: dict[int, WeightSimilarity], member: str, name: str) -> dict[str, Any]:
    """Mean similarity of the experts to one other member: the shared expert or the dense model."""
    rows = []
    for index, w in found.items():
        if member in w.members:
            at, e = w.members.index(member), len(w.pca["gate"])
            rows.append([str(index), *(shown(float(t[k][at, :e].mean())) for t in (w.matrix, w.neuron) for k in KINDS)])
    columns = ["layer", *(f"{k} matrix" for k in KINDS), *(f"{k} mean neuron" for k in KINDS)]
    return {"title": f"Weights: mean cosine of the experts to {name}", "columns": columns, "rows": rows}


def reorder_table(found: dict[int, dict[str, list[Match]]]) -> dict[str, Any]:
    """S3, one row per layer and kind: means over pairs."""
    rows = []
    for index, by in found.items():
        for kind, matches in by.items():
            n = len(matches)
            means = (sum(m.before for m in matches) / n, sum(m.cosine for m in matches) / n, sum(m.tau for m in matches) / n)
            rows.append([str(index), kind, str(n), *map(shown, means)])
    columns = ["layer", "matched by", "pairs", "cosine before", "after", "Kendall's tau"]
    return {"title": "Weights: neurons of one expert matched to those of another", "columns": columns, "rows": rows}


def output_table(found: dict[int, LayerOutputs]) -> dict[str, Any]:
    """D1, D2 and load, one row per layer."""
    rows = []
    for index, o in found.items():
        top = float(o.ranks[-1, -1]) / o.tokens
        rows.append(
            [
                str(index),
                shown(mean_pair(o.angle / o.tokens, o.experts)),
                shown(mean_pair(o.cosine / o.tokens, o.experts)),
                f"{top:.0%}",
                f"{o.effective:.1f} of {o.experts}",
            ]
        )
    columns = ["layer", "angular similarity", "cosine", "largest output is scored highest", "experts in use"]
    return {"title": "Outputs: all experts on the same tokens", "columns": columns, "rows": rows}


def advice_table(given: list[Advice]) -> dict[str, Any]:
    rows = [[f"layer {a.layer}: {a.found}", a.act] for a in given] or [
        ["nothing to do", "no copies, no dead experts, no layer with too many"]
    ]
    return {"title": "Advice", "columns": ["found", "what to do"], "rows": rows, "prose": True}


def weight_plots(found: dict[int, WeightSimilarity]) -> list[dict[str, Any]]:
    plots = [
        map_plot(f"Layer {i}: cosine of the gate matrices", found[i].members, found[i].matrix["gate"])
        for i in spread_out(list(found), _MAPS)
    ]
    depth = {k: [[i, mean_pair(w.matrix[k], len(w.pca[k]))] for i, w in found.items()] for k in KINDS}
    plots.append({"kind": "line", "title": "Likeness of the experts' weights", "x": "layer", "y": "mean cosine", "series": depth})
    r2 = {k: [[i, w.r2[k]] for i, w in found.items() if math.isfinite(w.r2[k])] for k in KINDS}
    if all(r2.values()):
        plots.append({"kind": "line", "title": "Router against mean neurons", "x": "layer", "y": "r2", "series": r2})
    return plots


def output_plots(found: dict[int, LayerOutputs], words: list[str]) -> list[dict[str, Any]]:
    some = spread_out(list(found), _MAPS)
    plots = [map_plot(f"Layer {i}: angular similarity of outputs", found[i].members, found[i].angle / found[i].tokens) for i in some]
    depth = {"angular": [[i, mean_pair(o.angle / o.tokens, o.experts)] for i, o in found.items()]}
    plots.append({"kind": "line", "title": "Likeness of the experts' outputs", "x": "layer", "y": "similarity", "series": depth})
    if len({o.experts for o in found.values()}) == 1:
        ranks = torch.stack([o.ranks for o in found.values()]).sum(0)
        names = [str(r + 1) for r in range(len(ranks))]
        title = "Norm of the output against router score, ranks over all layers and tokens"
        shape = {"x": "rank of the score", "y": "rank of the norm", "columns": names, "rows": names}
        plots.append({"kind": "heat", "title": title, **shape, "values": ranks.tolist(), "note": "the last rank is the largest"})
        plots.append(load_plot(torch.stack([o.load for o in found.values()])))
    plots += [_chosen_plot(i, found[i], words) for i in spread_out(list(found), 3)]
    plots += [p for i in spread_out(list(found), 2) if (p := _hidden_plot(i, found[i]))]
    return plots


def _chosen_plot(index: int, o: LayerOutputs, words: list[str]) -> dict[str, Any]:
    n = min(len(o.chosen), 24)
    values = [[1.0 if e in o.chosen[t] else 0.0 for t in range(n)] for e in range(o.experts)]
    columns = [w.strip() or repr(w)[1:-1] for w in words[:n]] if len(words) >= n else [str(t) for t in range(n)]
    return {"kind": "heat", "title": f"Layer {index}: experts of the first tokens", "x": "token", "y": "expert"} | {
        "columns": columns,
        "rows": list(range(o.experts)),
        "values": values,
    }


def _hidden_plot(index: int, o: LayerOutputs, bins: int = 32) -> dict[str, Any] | None:
    if o.hidden is None:
        return None
    mean = o.hidden / o.tokens
    parts = [p.mean(1) for p in mean.sort(1, descending=True).values.tensor_split(min(bins, mean.shape[1]), 1)]
    values = torch.stack(parts, 1).tolist()
    title = f"Layer {index}: size of act(gate x), neurons of each expert in falling order"
    return {"kind": "heat", "title": title, "x": "neurons, grouped", "y": "expert"} | {
        "columns": list(range(1, len(parts) + 1)),
        "rows": list(range(o.experts)),
        "values": values,
    }
