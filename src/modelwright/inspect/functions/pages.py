"""Tables and pictures of inspect.modularity."""

from typing import Any

import numpy as np


# ---- recorded results ------------------------------------------------------------------------------------------------
def published_sentence(found: dict[str, Any]) -> str:
    said = []
    if "switch" in found:
        said.append("Switch, few-shot: " + ", ".join(f"{s} {r['average']:.2f} %" for s, r in found["switch"].items()) + ".")
    if "t5" in found:
        for name, f in found["t5"].items():
            rows = {m: by["12"] for m, by in f["accuracy"].items() if "12" in by}
            said.append(f"T5, {name}, 12 of 96 experts' worth disturbed: " + ", ".join(f"{m} {v:.4f}" for m, v in rows.items()) + ".")
    if "stabilisation" in found:
        for model, by in found["stabilisation"].items():
            parts = [f"{level} " + "/".join(f"{v[1]:.3f}" for v in fs.values() if len(v) > 1) for level, fs in by.items()]
            said.append(f"{model}, second interval: {', '.join(parts)}.")
    return " ".join(said)


def published_tables(found: dict[str, Any]) -> list[dict[str, Any]]:
    tables = []
    if switch := found.get("switch"):
        names = list(next(iter(switch.values()))["datasets"])
        rows = [
            [s, f"{r['average']:.2f}", *(f"{r['datasets'][n]:.2f}" if n in r["datasets"] else "" for n in names)] for s, r in switch.items()
        ]
        tables.append(
            {"title": "Switch with its routing restricted, accuracy in %", "columns": ["experts", "average", *names], "rows": rows}
        )
    for name, f in found.get("t5", {}).items():
        shares = sorted({int(s) for by in f["accuracy"].values() for s in by})
        rows = [[str(s), *(f"{by[str(s)]:.4f}" if str(s) in by else "" for by in f["accuracy"].values())] for s in shares]
        title = f"T5 with neurons disturbed, accuracy over {', '.join(f['tasks'])} ({name})"
        tables.append({"title": title, "columns": ["experts' worth of 96", *f["accuracy"]], "rows": rows})
    for model, by in found.get("stabilisation", {}).items():
        functions = list(next(iter(by.values())))
        rows = [
            [level, *(f"{fs[f][1]:.3f}" for f in functions)] for level, fs in by.items() if all(len(fs.get(f, [])) > 1 for f in functions)
        ]
        tables.append({"title": f"{model}: Spearman's correlation over the second interval", "columns": ["of", *functions], "rows": rows})
    return tables


def published_plots(found: dict[str, Any]) -> list[dict[str, Any]]:
    plots = []
    for name, f in found.get("t5", {}).items():
        series = {m: [[int(s), v] for s, v in by.items()] for m, by in f["accuracy"].items() if len(by) > 1}
        plots.append({"kind": "line", "title": f"T5, {name}", "x": "experts' worth of 96 disturbed", "y": "accuracy", "series": series})
    for model, by in found.get("stabilisation", {}).items():
        functions = list(next(iter(by.values())))
        for f in functions:
            series = {level: [[i, v] for i, v in enumerate(fs[f])] for level, fs in by.items() if f in fs}
            title = f"{model}: {f} functions settle"
            plots.append({"kind": "line", "title": title, "x": "interval between checkpoints", "y": "Spearman", "series": series})
    return plots


# ---- a model's own ---------------------------------------------------------------------------------------------------
def _over_layers(row: dict[str, Any], key: str) -> float:
    return float(np.mean([r[key] for r in row["layers"].values()]))


def own_sentence(m: dict[str, Any]) -> str:
    best = {n: max(r["best"] for r in f["layers"].values()) for n, f in m["functions"].items()}
    top = max(best, key=lambda n: best[n] - m["functions"][n]["chance"])
    cut = f" {m['cut']} examples were cut at the context." if m["cut"] else ""
    left = f" {m['left_out']} examples beyond the limit were left out." if m["left_out"] else ""
    return (
        f"{len(best)} functions; the best neuron tells '{top}' with an average precision of {best[top]:.3f} "
        f"(chance {m['functions'][top]['chance']:.3f}).{cut}{left}"
    )


def own_tiles(m: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = m["functions"].values()
    own, random = (float(np.mean([_over_layers(f, k) for f in rows])) for k in ("share", "random_share"))
    return [(f"{own:.1%}", "of the experts are functional", f"{random:.1%} of random groups")]


def own_tables(m: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, f in m["functions"].items():
        layer, best = max(((i, r["best"]) for i, r in f["layers"].items()), key=lambda x: x[1])
        shares = (f"{_over_layers(f, k):.1%}" for k in ("share", "random_share"))
        degrees = (f"{_over_layers(f, k):.2f}" for k in ("degree", "random_degree"))
        rows.append([name, f["level"], str(f["examples"]), f"{f['chance']:.3f}", f"{best:.3f}", layer, *shares, *degrees])
    columns = ["function", "level", "examples", "chance AP", "best AP", "layer"]
    columns += ["functional experts", "of random groups", "modularisation", "of random groups"]
    tables = [{"title": "Predictivity of neurons, and functional experts (means over layers)", "columns": columns, "rows": rows}]
    levels = m["levels"]
    rows = [[a, *("" if r["overlap"][b] is None else f"{r['overlap'][b]:.3f}" for b in levels)] for a, r in levels.items()]
    tables.append({"title": "Share of common neurons among the best 32 of two functions", "columns": ["", *levels], "rows": rows})
    if "perturbation" in m:
        tables.append(_perturbation(m["perturbation"]))
    if "stabilisation" in m:
        tables.append(_stabilisation(m["stabilisation"]))
    return tables


def _perturbation(found: dict[str, Any]) -> dict[str, Any]:
    title = "Rise of the loss on a function's texts with its neurons disturbed, nats per token"
    if "left_out" in found:
        return {"title": title, "columns": [""], "rows": [[found["left_out"]]], "prose": True}
    rows = []
    for name, f in found.items():
        for share, r in f["rise"].items():
            rows.append([name, f"{float(share):.0%}", *(f"{r[k]:+.4f}" if k in r else "" for k in ("best", "experts", "random"))])
    return {"title": title, "columns": ["function", "neurons", "its best neurons", "its best experts", "random neurons"], "rows": rows}


def _stabilisation(found: dict[str, Any]) -> dict[str, Any]:
    rows = [[kind, level, *(f"{v:.3f}" for v in values)] for kind, by in found.items() for level, values in by.items()]
    n = len(rows[0]) - 2
    return {"title": "Spearman's correlation between checkpoints", "columns": ["of", "level", *(f"{i}" for i in range(n))], "rows": rows}


def own_plots(m: dict[str, Any]) -> list[dict[str, Any]]:
    levels = m["levels"]
    depth = {a: [[int(i), x["best"]] for i, x in r["layers"].items()] for a, r in levels.items()}
    plots = [{"kind": "line", "title": "Best neuron per layer", "x": "layer", "y": "average precision", "series": depth}]
    series = {}
    for a, r in levels.items():
        series[a] = [[int(i), x["share"]] for i, x in r["layers"].items()]
        series[f"{a}, random"] = [[int(i), x["random_share"]] for i, x in r["layers"].items()]
    plots.append({"kind": "line", "title": "Functional experts", "x": "layer", "y": "share", "series": series})
    rises = {n: f["rise"] for n, f in m.get("perturbation", {}).items() if isinstance(f, dict)}
    for name, by in list(rises.items())[:4]:
        kinds = dict.fromkeys(k for r in by.values() for k in r)
        lines = {k: [[100 * float(s), r[k]] for s, r in by.items() if k in r] for k in kinds}
        plots.append(
            {"kind": "line", "title": f"{name}: neurons disturbed", "x": "% of all neurons", "y": "rise of the loss", "series": lines}
        )
    return plots
