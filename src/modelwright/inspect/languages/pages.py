"""Tables and pictures of the multilingual report."""

from typing import Any

import numpy as np

Table = dict[str, Any]
Plot = dict[str, Any]


def balance_table(found: dict[str, Any]) -> list[Table]:
    rows = [
        [k, f"{n:,.0f}", f"{100 * found['shares'][k]:.1f} %", *(f"{100 * plan[k]:.1f} %" for plan in found["sampling"].values())]
        + [f"{found['unimax_epochs'][k]:.2f}"]
        for k, n in found["sizes"].items()
    ]
    columns = ["language", found["unit"], "share", *(f"alpha {a}" for a in found["sampling"]), "UniMax epochs"]
    return [{"title": "Balance and sampling plans", "columns": columns, "rows": rows}]


def token_table(costs: dict[str, dict[str, float]], premium: dict[str, float]) -> list[Table]:
    rows = [
        [k, f"{c['fertility']:.2f}", f"{c['tokens_per_byte']:.3f}", f"{premium[k]:.2f}", f"{100 * c['continued_words']:.0f} %"]
        + [f"{100 * c['unknown']:.1f} %", f"{100 * c['byte_fallback']:.1f} %", f"{c['not_the_same_when_decoded']:.0f}"]
        for k, c in costs.items()
    ]
    columns = ["language", "tokens a word", "tokens a byte", "premium", "words in pieces", "unknown", "bytes", "not the same decoded"]
    return [{"title": "Tokenizer", "columns": columns, "rows": rows}]


def _mean(of: dict[str, float]) -> float:
    return float(np.mean(list(of.values())))


def layer_pages(layers: list[dict[str, Any]], languages: int, sentences: int) -> tuple[list[Table], list[Plot]]:
    """One row and one point per layer, means over the languages."""
    names: tuple[str, ...] = (
        "precision_at_1",
        "precision_at_1_csls",
        "precision_at_1_half",
        "precision_at_1_centred_half",
        "cka",
        "procrustes",
    )
    names += ("gromov_hausdorff", "spectral", "anisotropy")
    rows = [
        [str(i), *(f"{_mean(at[n]):.3f}" for n in names), f"{100 * at['language_probe']:.1f} %"]  # a row of means
        for i, at in enumerate(layers)
    ]
    columns = ["layer", "P@1", "P@1 CSLS", "P@1 half", "P@1 half, centred", "CKA", "Procrustes", "Gromov-Hausdorff", "spectral"]
    tables = [{"title": "Shared space, means over languages", "columns": [*columns, "anisotropy", "language probe"], "rows": rows}]
    chance = {"at": 1 / sentences, "name": "chance"}
    plots: list[Plot] = [
        _lines("Translation found first (P@1)", "share", {k: [a["precision_at_1"][k] for a in layers] for k in layers[0]["cka"]}, chance),
        _lines("Linear CKA with the pivot", "CKA", {k: [a["cka"][k] for a in layers] for k in layers[0]["cka"]}),
        _lines(
            "Language is readable, and centring",
            "share",
            {
                "language probe": [a["language_probe"] for a in layers],
                "P@1": [_mean(a["precision_at_1_half"]) for a in layers],
                "P@1, centred": [_mean(a["precision_at_1_centred_half"]) for a in layers],
            },
            {"at": 1 / languages, "name": "chance of the probe"},
        ),
        _lines("Anisotropy: cosine of two sentences", "cosine", {k: [a["anisotropy"][k] for a in layers] for k in layers[0]["anisotropy"]}),
    ]
    return tables, plots


def _lines(title: str, y: str, series: dict[str, list[float]], line: dict[str, Any] | None = None) -> Plot:
    plot: Plot = {"kind": "line", "title": title, "x": "layer", "y": y}
    plot["series"] = {k: [[i, v] for i, v in enumerate(of)] for k, of in series.items()}
    return plot | ({"line": line} if line else {})


def debias_table(found: dict[str, dict[str, Any]], layer: int) -> list[Table]:
    rows = [
        [name, f"{100 * of['language_probe']:.1f} %", f"{of['precision_at_1']:.3f}", f"{of['loss']:.4f}" if "loss" in of else ""]
        for name, of in found.items()
    ]
    columns = ["vectors", "language probe", "P@1", "loss of the model, nats per token"]
    return [{"title": f"Without the language, layer {layer}", "columns": columns, "rows": rows}]


def crows_pages(found: dict[str, Any]) -> tuple[list[Table], list[Plot]]:
    rows = [[k, of["pairs"], f"{of['preferred']:.1f} %"] for k, of in found["by_group"].items()]
    table = {"title": f"CrowS-Pairs: {found['how']}", "columns": ["group", "pairs", "stereotype preferred"], "rows": rows}
    types = {k: of["preferred"] for k, of in found["by_group"].items() if not k.startswith("direction")}
    plot = {"kind": "bars", "title": "CrowS-Pairs: the stereotype is preferred", "y": "% of pairs", "groups": list(types)}
    return [table], [plot | {"series": {"preferred": list(types.values())}, "line": {"at": 50, "name": "even-handed"}}]


def seat_pages(found: dict[str, dict[str, Any]]) -> tuple[list[Table], list[Plot]]:
    ways = ("after INLP", "after LEACE", "after hard debiasing")
    rows = [
        [name, f"{of['effect']:+.2f}", f"{of['p']:.3f}" + ("" if of["exact"] else " (drawn)"), *(f"{of[w]:+.2f}" for w in ways)]
        for name, of in found.items()
    ]
    table = {"title": "WEAT and SEAT", "columns": ["test", "effect size", "p", *ways], "rows": rows}
    size = np.abs([of["by_layer"] for of in found.values()]).mean(0)
    return [table], [_lines("Mean size of the associations", "|effect size|", {"mean of all tests": size.tolist()})]
