"""TapTap: values come back as they were, rows are valid whatever the model knows, rules of a table are learnt."""

import csv
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import modelwright
from modelwright.core.data.rows import IGNORE, PaddedDataset
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import SEEDLING, Checkpoint
from modelwright.modalities.tabular import gaps, quality
from modelwright.modalities.tabular.backbone import Backbone, Features, maker, task_of
from modelwright.modalities.tabular.columns import Category, Free, Padded, columns_of, field, left_out, read_columns, rows_of, take
from modelwright.modalities.tabular.decode import AnyOrder, log_probability, write
from modelwright.modalities.tabular.language import Language
from modelwright.modalities.tabular.model import TapTap
from modelwright.modalities.tabular.uses import readable

pytest.importorskip("sklearn", reason="the extra `series` is not installed")
DATA = Path(os.environ.get("MODELWRIGHT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "tabular"
TRICKY = {
    "a is b": ["x, y", " is ", "None", "x", None, "x, y is x"],
    "flag": [True, False, True, True, False, True],
    "tiny": [1e-7, -2.5, 0.0004, 1e16, 3.0, -0.25],
    "whole, with gaps": [3, None, -12, 4, 0, 5],
    "price": [5.0, 12.25, 0.5, 99.99, 7.1, 3.0],
    "huge": [10**15, -5, 7, 12, 3, 9],
    "day": ["2024-02-29", "1999-12-31", "2024-03-01", "2000-01-01", "2012-06-30", "2024-02-29"],
    "when": ["2024-02-29 23:59:59", "2024-03-01 00:00:00", None, "2024-03-02 12:00:01", "2024-03-01 00:00:00", "2024-03-01 00:00:30"],
}
SMALL = {"epochs": 1, "batch": 16, "lr": 1e-3, "record": False}
TABLES = {
    "insurance.csv": [],
    "german_credit.csv": [],
    "california_housing.csv": [],
    "titanic.csv": [],
    "penguins.json": [],
    "beijing_pm25.csv": [],
    "pima_diabetes.csv": [f"c{i}" for i in range(9)],
    "adult_test_16k.csv": [f"c{i}" for i in range(15)],
}


def spoken(columns: dict, tokenizer=None) -> tuple[Language, list]:
    if tokenizer is not None:
        language = Language([], tokenizer)
        return language, language.fields(columns)
    fields = [field(n, v) for n, v in columns.items()]
    return Language([fields]), fields


def same(a: dict, b: dict) -> bool:
    """Equal values of equal types, but that a column with decimals holds decimals only."""
    return all(a[n] == b[n] and (a[n] is None) == (b[n] is None) and isinstance(a[n], bool) == isinstance(b[n], bool) for n in a)


def come_back(columns: dict, tokenizer=None) -> None:
    """Each row, its columns in a drawn order, is read back."""
    language, fields = spoken(columns, tokenizer)
    rows, objective = language.rows([(fields, columns)]), order(3)
    truth = rows_of(columns)
    for at in range(0, len(rows), 64):
        part = [rows[i] for i in range(at, min(at + 64, len(rows)))]
        batch = objective.collate(part)
        for k, r in enumerate(part):
            ids = batch["input_ids"][k, : int(r["length"])].tolist()
            assert same(language.read(ids, fields), truth[at + k])


def order(seed: int) -> AnyOrder:
    return AnyOrder(SimpleNamespace(config=None), None, seed)


@pytest.mark.parametrize("text", [False, True], ids=["schema", "text"])
def test_rows_are_read_back_whatever_they_hold(text: bool) -> None:
    come_back(TRICKY, Checkpoint(SEEDLING).tokenizer() if text else None)


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_real_tables_are_read_back(name: str) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"no {DATA / name}")
    columns = read_columns(str(DATA / name), TABLES[name] or None)
    come_back(take(columns, range(0, len(next(iter(columns.values()))), 97)))


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_every_real_table_is_read_back(name: str) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"no {DATA / name}")
    come_back(read_columns(str(DATA / name), TABLES[name] or None))


def test_kinds_of_columns() -> None:
    kinds = {n: type(field(n, v)) for n, v in TRICKY.items()}
    assert kinds == {"a is b": Category, "flag": Category, "tiny": Free, "whole, with gaps": Padded, "price": Padded, "huge": Free,
                     "day": Padded, "when": Padded}  # fmt: skip
    assert field("day", TRICKY["day"]).form == "date" and field("price", TRICKY["price"]).decimals == 2


def test_a_value_that_the_table_has_not_is_refused() -> None:
    language, fields = spoken(TRICKY)
    for name, value in (("a is b", "new"), ("flag", 1), ("price", 1000.0), ("day", "2050-01-01"), ("tiny", 1e-9), ("huge", 10**17)):
        with pytest.raises(UserError, match="was never seen|cannot be written"):
            language.value(next(f for f in fields if f.name == name), value)


def test_padding_and_names_cost_nothing_and_values_do() -> None:
    language, fields = spoken(TRICKY)
    rows = language.rows([(fields, TRICKY)])
    full = PaddedDataset(rows, 8)
    batch = order(0).collate([full[i] for i in range(8)])
    beyond = ~batch["real"]
    assert bool((batch["labels"][beyond] == IGNORE).all()) and int(beyond.sum()) > 0
    names = {language.name(f)[0] for f in fields}
    learnt = batch["labels"][batch["labels"] != IGNORE]
    assert not names & set(learnt.tolist())
    assert torch.equal(learnt, batch["input_ids"][batch["labels"] != IGNORE])


def test_each_reading_has_an_order_of_its_own_by_seed_step_and_row_alone() -> None:
    language, fields = spoken(TRICKY)
    rows = language.rows([(fields, TRICKY)])
    objective = order(0)

    def read(which: list[int], step: int) -> dict[int, list[int]]:
        batch = objective.collate([rows[i] for i in which])
        objective.prepare(batch, step)
        return {i: batch["cells"][k][: int(rows[i]["length"])].unique_consecutive().tolist() for k, i in enumerate(which)}

    first = read([0, 1, 2, 3], 5)
    assert first[1] == read([1], 5)[1]
    assert len({tuple(v) for v in first.values()}) > 1 and first != read([0, 1, 2, 3], 6)


def agreement(a: list, b: list) -> float:
    return float(np.mean([x == y for x, y in zip(a, b, strict=True)]))


@pytest.fixture(scope="module")
def rule() -> dict:
    """A table with a rule: size follows from colour, price from size."""
    colours = ["red", "green", "blue", "grey"]
    g = np.random.default_rng(0)
    rows = [
        {"colour": c, "size": (i := colours.index(c)) * 11 + 3, "price": i * 1.5, "noise": int(g.integers(0, 50))}
        for c in g.choice(colours, 240)
    ]
    return columns_of([{k: str(v) if isinstance(v, np.str_) else v for k, v in r.items()} for r in rows], list(rows[0]))


@pytest.fixture(scope="module")
def learnt(rule: dict, tmp_path_factory) -> TapTap:
    torch.set_num_threads(1)
    train = Train(epochs=16, lr=1e-2, batch=40, schedule="cosine", record=False)
    return TapTap(train=train, shape=(1, 32, 2)).fit(rule, tmp_path_factory.mktemp("fit"))


@pytest.fixture(scope="module")
def blank() -> TapTap:
    """A model that knows nothing."""
    model = TapTap(shape=(1, 16, 2))
    model._speak([TRICKY])
    model.counts = Counter(TRICKY["when"])
    return model


def test_the_rule_of_a_table_is_learnt(learnt: TapTap, rule: dict) -> None:
    some = take(rule, range(40))
    hidden = some | {"size": [None] * 40, "price": [None] * 40}
    filled = learnt.impute(hidden)
    assert filled["size"] == some["size"] and filled["price"] == some["price"]
    assert agreement(learnt.predict(some, "colour"), some["colour"]) > 0.9


def test_a_table_without_gaps_is_not_changed_by_imputing(learnt: TapTap, rule: dict) -> None:
    assert learnt.impute(rule) == rule


def test_probabilities_under_the_grammar_add_up_to_one(learnt: TapTap, rule: dict) -> None:
    known = {"noise": 3}
    for name, values in (("colour", ["red", "green", "blue", "grey"]), ("size", range(3, 37))):
        f = next(f for f in learnt.fields if f.name == name)
        total = sum(np.exp(log_probability(learnt.model, learnt.language, f, known, learnt.fields, v)) for v in values)
        assert total == pytest.approx(1, abs=1e-5)


def test_an_untrained_model_writes_valid_rows_only(blank: TapTap) -> None:
    rows = blank.sample(30, gaps=True)
    for f in blank.fields:
        assert all(v is None and f.gaps or readable(f, v) for v in rows[f.name]), f.name
    whole = blank.sample(30)
    assert all(readable(f, v) for f in blank.fields for v in whole[f.name])
    assert blank.valid < 0.01


def test_a_row_is_written_the_same_alone_and_among_others(learnt: TapTap) -> None:
    known = [{"colour": c} for c in ("red", "blue", "grey")] + [{"size": 14, "noise": 9}, {}]
    args = (learnt.model, learnt.language, learnt.fields)
    assert write(*args, known, temperature=0)[0] == write(*args, known, temperature=0, batch=1)[0]


def test_what_is_given_stays_and_rare_classes_are_all_that_is_asked_for(learnt: TapTap, rule: dict, tmp_path: Path) -> None:
    rows = learnt.sample(12, [{"colour": "blue", "noise": 7}] * 12)
    assert set(rows["colour"]) == {"blue"} and set(rows["noise"]) == {7}
    model = TapTap(train=Train(epochs=1, batch=16, record=False), shape=(1, 16, 2))
    last = {"x": rule["noise"], "kind": ["rare" if i < 7 else "usual" for i in range(240)]}
    model.fit(last, tmp_path)
    assert set(model.balance("kind", 20)["kind"]) == {"rare"}


def test_seeds_decide(learnt: TapTap) -> None:
    assert learnt.sample(8, seed=1) == learnt.sample(8, seed=1) != learnt.sample(8, seed=2)


def test_a_saved_model_goes_on_and_a_base_writes_rows_as_text(learnt: TapTap, rule: dict, tmp_path: Path) -> None:
    learnt.save(tmp_path / "model")
    part = take(rule, range(60))
    train = Train(epochs=1, batch=16, lr=1e-4, record=False)
    again = TapTap(Checkpoint(tmp_path / "model"), train).fit(part, tmp_path / "a")
    assert agreement(again.predict(part, "colour"), part["colour"]) > 0.9
    text = TapTap(Checkpoint(SEEDLING), train).fit(take(rule, range(16)), tmp_path / "b")
    assert all(readable(f, v) for f in text.fields for v in text.sample(4)[f.name])


def test_pretraining_sees_each_table_alike(rule: dict, tmp_path: Path) -> None:
    model = TapTap(train=Train(**SMALL), shape=(1, 16, 2))
    more = [{"colour": ["red"] * 3, "weight": [1, 2, 3]}, take(rule, range(30))]
    model._speak([rule, *more])
    assert [len(next(iter(c.values()))) for _, c in model._evenly(more)] == [30, 30]
    assert model.fit(rule, tmp_path, more).sample(3)["colour"]


@pytest.mark.parametrize("mechanism", ["mcar", "mar", "mnar"])
def test_holes_are_as_many_as_asked_and_depend_on_what_they_should(mechanism: str) -> None:
    g = np.random.default_rng(1)
    columns = {"a": g.normal(size=2000).tolist(), "b": g.normal(size=2000).tolist()}
    hidden = gaps.holes(columns, ["a", "b"], 0.2, mechanism, g)
    assert not hidden.all(1).any() and abs(hidden[:, 0].mean() - 0.2) < 0.04
    by = {"mcar": None, "mar": "b", "mnar": "a"}[mechanism]
    for name in ("a", "b"):
        x = np.array(columns[name])
        higher = x[hidden[:, 0]].mean() - x[~hidden[:, 0]].mean()
        assert higher > 0.3 if name == by else abs(higher) < 0.2


def test_usual_ways_fill_every_gap_and_touch_nothing_else() -> None:
    columns = {"a": [1.0, None, 3.0, 2.0] * 5, "b": ["x", "y", None, "x"] * 5}
    for how in ("mean", "knn", "mice"):
        filled = gaps.usual(columns, ["a", "b"], how)
        assert all(v is not None for v in (*filled["a"], *filled["b"]))
        assert all(f == v for n in "ab" for f, v in zip(filled[n], columns[n], strict=True) if v is not None)
    assert gaps.usual(columns, ["a", "b"], "mean")["a"][1] == pytest.approx(2.0)


def test_distances_and_copies() -> None:
    rows = {"a": [1, 2, 3], "b": ["x", "y", "x"]}
    assert quality.copies(rows, rows) == 1.0 and quality.copies({"a": [1, 9], "b": ["x", "x"]}, rows) == 0.5
    x = np.array([[0.0, 0], [3, 4]])
    assert quality.closest(np.array([[0.0, 1], [3, 4]]), x).tolist() == [1, 0]


def test_a_backbone_of_each_kind() -> None:
    assert task_of([0, 1, 1]) == "classification" and task_of([0.5, 1.5]) == "regression" and task_of(["a"]) == "classification"
    columns = {"x": [float(i) for i in range(40)], "y": ["low" if i < 20 else "high" for i in range(40)]}
    one = Backbone(maker("RandomForest", "classification", {"n_estimators": 5}), "classification", "y", Features(columns, ["x"]))
    assert one.fit(columns).score(columns)["score"] == 1.0
    assert one.relabel(columns, columns["y"]) == columns
    for name, why in (("Nothing", "is unknown"), ("nowhere:LGBM", "cannot be imported")):
        with pytest.raises(UserError, match=why):
            maker(name, "regression", {})
    with pytest.raises(UserError, match="has no setting 'trees'"):
        maker("RandomForest", "regression", {"trees": 3})


# ---- the command -------------------------------------------------------------------------------------------------------
def table(folder: Path, rule: dict, **more: list) -> str:
    columns = {"id": list(range(240)), **rule, **more}
    with open(folder / "t.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns)
        out.writerows(zip(*columns.values(), strict=True))
    return str(folder / "t.csv")


def run(folder: Path, file: str, **knobs):
    tiny = {"layers": 1, "hidden": 16, "heads": 2, "train": SMALL, "backbone": "DecisionTree"}
    return modelwright.run("modalities.taptap", to=folder / "out", table=file, **(tiny | knobs))


@pytest.mark.parametrize("use", ["privacy", "low_resource", "missing", "imbalance"])
def test_each_use_measures_itself_and_writes_its_rows(use: str, rule: dict, tmp_path: Path) -> None:
    kind = ["rare" if i % 4 == 0 else "usual" for i in range(240)]
    result = run(tmp_path, table(tmp_path, rule, kind=kind), use=use)
    metrics = result.plain()["metrics"]
    assert metrics.get("valid", 1.0) == 1.0 and len(metrics["scores"]) >= 4
    assert "id: it numbers the rows" in json.dumps(result.steps[-1]["facts"])
    with open(result.to / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 20 and set(rows[0]) == {"id", *rule, "kind"}
    if use == "imbalance":
        assert metrics["rare_share"] == 1.0 and {r["kind"] for r in rows} == {"rare"}
    if use == "missing":
        assert metrics["hidden"] > 0 and all(r["size"] and r["colour"] for r in rows)


def test_a_way_to_tune_runs_on_a_table(rule: dict, tmp_path: Path) -> None:
    result = run(tmp_path, table(tmp_path, rule), tune="hft", target="colour")
    assert result.plain()["metrics"]["valid"] == 1.0


@pytest.mark.parametrize(
    ("header", "knobs", "what"),
    [
        ("a\n" + "1.5\n2.5\n" * 20, {}, "1 column can be learnt from"),
        ("a,b\n" + "1,\n2,\n" * 20, {}, "'b' cannot be predicted"),
        ("a,b\n1,2\n", {}, "has 1 rows"),
        ("a,b\n" + "1,x\n2,y\n" * 20, {"target": "c"}, "no column 'c'"),
        ("a,b\n" + "1.5,2.5\n2.25,1.75\n" * 20, {"use": "imbalance"}, "has no classes"),
        ("a,b\n" + "1,x\n2,y\n" * 20, {"hidden": 18, "heads": 4}, "do not fit"),
        ("a,b\n" + "1,x\n2,y\n" * 20, {"tune": "c_rlft"}, "cannot learn a table|conditions"),
    ],
)
def test_bad_input_is_one_sentence(header: str, knobs: dict, what: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(header)
    with pytest.raises(UserError, match=what):
        run(tmp_path, str(tmp_path / "t.csv"), **knobs)
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_base_are_refused(tmp_path: Path) -> None:
    columns = {f"a long name of a column, number {i}": [1.5, 2.5] * 10 for i in range(80)}
    with pytest.raises(UserError, match="a row has .* tokens"):
        TapTap(Checkpoint(SEEDLING), Train(**SMALL)).fit(columns, tmp_path)


def test_columns_that_say_nothing_are_left_out_and_named() -> None:
    columns = {"empty": [None] * 30, "number": list(range(30)), "name": [f"n{i}" for i in range(30)], "x": [1, 2, 3] * 10}
    assert left_out(columns) == {
        "empty": "all values are missing",
        "number": "it numbers the rows",
        "name": "most of its values occur once",
    }
    assert left_out(columns, ids=True) == {"empty": "all values are missing"}
