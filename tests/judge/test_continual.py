"""judge.continual: measures from accuracy matrices, the published ones to the digit, and the runner that fills one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelwright import registry
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.report.plots import draw
from modelwright.core.step import StepContext
from modelwright.core.train.technique import Technique
from modelwright.judge.continual import Knobs, Run, Task, continual, found, read, read_task
from modelwright.judge.tasks import sequence
from modelwright.judge.tasks.sequence import Learner


def measured(raw: Any, folder: Path) -> dict[str, Any]:
    (folder / "runs.json").write_text(json.dumps(raw))
    return continual(Knobs(matrix=str(folder / "runs.json")), StepContext(folder)).metrics


# ---- measures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("run", "aa", "bwt"),
    [
        ("order1_seqft", 67.77, -14.50),
        ("order1_seqlora", 62.88, None),
        ("order1_icrlora", 68.62, -14.55),
        ("order1_olora", 78.37, -1.18),
    ],
)
def test_published_runs_are_recomputed_to_the_digit(run: str, aa: float, bwt: float | None, shared: Path) -> None:
    of = found(read(shared / "olora_runs" / "accuracy_matrices.json")).metrics[run]
    assert round(of["AA"], 2) == aa and (bwt is None or round(of["BWT"], 2) == bwt)
    assert len(of["matrix"]) == len(of["tasks"]) == 4


def test_all_measures_of_a_small_matrix(tmp_path: Path) -> None:
    of = measured({"tasks": ["a", "b", "c"], "matrix": [[90, 20, 30], [70, 80, 10], [60, 50, 100]], "untrained": [5, 10, 25]}, tmp_path)
    assert of["runs"] == {
        "AA": pytest.approx(70),
        "BWT": pytest.approx((60 - 90 + 50 - 80) / 2),
        "BWT_TRACE": pytest.approx((60 - 90 + 50 - 80) / 3),
        "FWT": pytest.approx((20 - 10 + 10 - 25) / 2),
        "LA": pytest.approx(90),
        "OP": pytest.approx([90, 75, 70]),
        "tasks": ["a", "b", "c"],
        "matrix": [[90, 20, 30], [70, 80, 10], [60, 50, 100]],
        "untrained": [5, 10, 25],
        "cut": None,
    }


def test_trace_performance_of_the_last_stage_is_the_average_accuracy() -> None:
    of = Run(["a", "b"], [[80.0, None], [60.0, 70.0]]).measures()
    assert of["OP"] == [80.0, 65.0] and of["AA"] == 65.0 and of["BWT"] == -20.0 and of["FWT"] is None and of["LA"] == 75.0


@pytest.mark.parametrize("stage", [{"task": "b"}, {"task": "b", "per": None}, {"task": "b", "per": {}}, {"task": "b", "per": {"b": 50}}])
def test_stage_without_scores_gives_none_and_no_crash(stage: dict[str, Any], tmp_path: Path) -> None:
    first, last = {"task": "a", "per": {"a": 90}}, {"task": "c", "per": {"a": 80, "b": 40, "c": 70}}
    finding = continual(Knobs(matrix=str(_json(tmp_path, {"one": {"1": first, "2": stage, "3": last}}))), StepContext(tmp_path))
    of, known = finding.metrics["one"], "b" in (stage.get("per") or {})
    assert of["AA"] == pytest.approx(190 / 3) and of["OP"] == [90, None, pytest.approx(190 / 3)]
    assert of["BWT"] == (-10 if known else None) and (of["LA"] is None) != known
    finding = continual(Knobs(matrix=str(_json(tmp_path, {"one": {"1": first, "2": last, "3": stage}}))), StepContext(tmp_path))
    assert finding.metrics["one"]["AA"] is None and finding.tiles[0][0] == "unknown"
    assert "<svg" in draw(finding.plots[-1]) and None in finding.plots[-1]["values"][0]


def test_stages_are_ordered_as_numbers(tmp_path: Path) -> None:
    stages = {str(i): {"task": f"t{i}", "per": {f"t{i}": i}} for i in (10, 9, 2, 1)}
    assert measured({"one": stages}, tmp_path)["one"]["tasks"] == ["t1", "t2", "t9", "t10"]


def _json(folder: Path, raw: Any) -> Path:
    (folder / "some.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder / "some.json"


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ("no json", "does not parse"),
        ("[]", "holds no runs"),
        ({}, "holds no runs"),
        ({"tasks": ["a"], "matrix": [[1]]}, "has 1 task"),
        ({"one": {"1": {"task": "a", "per": {"a": 3}}}}, "has 1 task"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2], [3]]}, "no accuracy matrix"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2]]}, "1 stages and 2 tasks"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2], [3, 101]]}, "101.0 is no accuracy"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2], [3, -1]]}, "-1.0 is no accuracy"),
        ('{"tasks": ["a", "b"], "matrix": [[1, 2], [3, NaN]]}', "nan is no accuracy"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2], [3, "x"]]}, "no accuracy matrix"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2], [3, 4]], "untrained": [1]}, "untrained"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2], [3, 4]], "untrained": [1, "x"]}, "no accuracy matrix"),
        ({"one": {"first": {"task": "a"}}}, "no accuracy matrix"),
        ({"one": 3}, "no accuracy matrix"),
        ({"tasks": ["a", "b"], "matrix": ["12", "34"]}, "a list is needed"),
        ({"tasks": "ab", "matrix": [[1, 2], [3, 4]]}, "a list is needed"),
        ({"tasks": ["a", "b"], "matrix": [["1", "2"], ["3", "4"]]}, "'1' is no accuracy in percent"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2], [3, True]]}, "True is no accuracy in percent"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2], [3, 4]], "untrained": "12"}, "a list is needed"),
        ({"tasks": ["a", "b"], "matrix": [[1, 2], [3, 10**400]]}, "is no accuracy in percent"),
        ('{"tasks": ["a", "b"], "matrix": [[1, 2], [3, 1e999]]}', "inf is no accuracy in percent"),
        ('{"one": {"1": {}}, "one": {"1": {}}}', "the key 'one' stands 2 times"),
        pytest.param("[" * 100_000, "does not parse", id="deep"),
        pytest.param('{"tasks": ["a", "b"], "matrix": [[1, 2], [3, ' + "1" * 5000 + "]]}", "does not parse", id="digits"),
    ],
    ids=str,
)
def test_what_is_no_matrix_is_refused(raw: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        continual(Knobs(matrix=str(_json(tmp_path, raw))), StepContext(tmp_path))


# ---- a sequence of tasks ---------------------------------------------------------------------------------------------
TRAIN = Train(batch=4, context=128, lr=1e-3, epochs=1, schedule="constant", warmup=0.0, record=False)


@pytest.fixture(scope="module")
def tasks(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two real tasks cut to twelve and ten short examples."""
    folder, found = tmp_path_factory.mktemp("tasks"), []
    for name in ("sst-2", "agnews"):
        raw = json.loads((shared / "cl15" / f"{name}.json").read_text())
        raw = {k: [r | {"sentence": r["sentence"][:90]} for r in raw[k][:n]] for k, n in (("train", 12), ("test", 10))} | {
            "labels": raw["labels"]
        }
        (folder / f"{name}.json").write_text(json.dumps(raw))
        found.append(str(folder / f"{name}.json"))
    return found


class Stopped(Exception):
    pass


def sequence_of(
    folder: Path, stories: Path, tasks: list[str], tune: str = "full", made: list | None = None, **knobs: Any
) -> dict[str, Any]:
    asked: list[str] = []

    def technique(name: str, settings: dict[str, Any]) -> list[Any]:
        found = registry.techniques_named(name, settings)
        if asked:  # the first ones are only looked at, to refuse them early
            (made if made is not None else []).append(found)
        asked.append(name)
        return found

    settings = Knobs(**{"tasks": tasks, "tune": tune, "train": TRAIN} | knobs)
    folder.mkdir(exist_ok=True)
    return continual(settings, StepContext(folder, source=Checkpoint(stories), technique=technique)).metrics[tune]


@pytest.mark.parametrize("tune", ["full", "migu", "hft", "lora"])
def test_sequence_fills_the_matrix_and_tells_each_technique_its_turn(tune: str, stories: Path, tasks: list[str], tmp_path: Path) -> None:
    made: list[list[Any]] = []
    of = sequence_of(tmp_path / "a", stories, tasks, tune, made)
    assert of["tasks"] == ["sst-2", "agnews"] and all(0 <= v <= 100 and v % 10 < 1e-6 or v for row in of["matrix"] for v in row)
    assert all(of[k] is not None for k in ("AA", "BWT", "FWT", "LA")) and len(of["untrained"]) == 2
    assert [(t.round, t.first_task) for (t,) in made] == [(0, True), (1, False)]
    if tune == "migu":
        assert not made[0][0].masks and made[1][0].masks
    if tune == "hft":
        assert made[0][0].frozen.keys() != made[1][0].frozen.keys()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["stages.json"]
    assert sequence_of(tmp_path / "a", stories, tasks, tune) == of  # all is done: nothing is trained or loaded


@pytest.mark.slow
def test_a_stopped_sequence_goes_on_to_the_same_matrix(
    stories: Path, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = sequence_of(tmp_path / "a", stories, tasks, "migu")
    real = {"accuracy": Learner.accuracy, "learn": Learner.learn}
    calls = {"accuracy": 0, "learn": 0}

    def stopping(name: str, at: int) -> Any:
        def call(self: Learner, *arguments: Any) -> Any:
            calls[name] += 1
            if calls[name] == at:
                raise Stopped
            return real[name](self, *arguments)

        return call

    # before training; amid the measures after the first task; before the second; amid its measures: all in one folder
    for name, at in (("accuracy", 1), ("accuracy", 4), ("learn", 2), ("accuracy", 2)):
        calls.update(accuracy=0, learn=0)
        monkeypatch.setattr(Learner, name, stopping(name, at))
        with pytest.raises(Stopped):
            sequence_of(tmp_path / "b", stories, tasks, "migu")
        monkeypatch.setattr(Learner, name, real[name])
    assert sequence_of(tmp_path / "b", stories, tasks, "migu") == want
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["stages.json"]


def test_training_stopped_within_a_task_goes_on_from_its_last_state(
    stories: Path, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = replace(TRAIN, save_every=2)
    want, real = sequence_of(tmp_path / "a", stories, tasks, train=train), sequence.fit

    def dies(model: Any, rows: Any, train: Any, *, folder: Path, tick: Any, **rest: Any) -> Any:
        def at(step: int, of: int) -> None:
            if step == 3 and folder.name == "task-1":
                raise Stopped
            tick(step, of)

        return real(model, rows, train, folder=folder, tick=at, **rest)

    monkeypatch.setattr(sequence, "fit", dies)
    with pytest.raises(Stopped):
        sequence_of(tmp_path / "b", stories, tasks, train=train)
    monkeypatch.setattr(sequence, "fit", real)
    assert (tmp_path / "b" / "task-1" / "checkpoint-2").is_dir()
    assert sequence_of(tmp_path / "b", stories, tasks, train=train) == want


def test_a_task_is_learnt_and_scored_among_its_own_labels(stories: Path, tasks: list[str], tmp_path: Path) -> None:
    task = read_task(Path(tasks[0]), 10)
    task.train = task.test = task.train[:6]
    learner = Learner(Checkpoint(stories), replace(TRAIN, epochs=15, lr=3e-3, batch=6), tmp_path, 0)
    assert learner.learn(task, 0, [Technique()], 0, lambda step, of: None) == 0 and learner.accuracy(task) == 100


def test_two_tasks_of_one_name_are_two_tasks(stories: Path, tasks: list[str], tmp_path: Path) -> None:
    found, both = [read_task(Path(t), 10) for t in tasks], Learner(Checkpoint(stories), TRAIN, tmp_path, 0)
    want = [Learner(Checkpoint(stories), TRAIN, tmp_path, 0).accuracy(t) for t in found]
    found[1].name = found[0].name
    assert [both.accuracy(t) for t in found] == want


@pytest.mark.parametrize(
    ("tune", "settings", "why"),
    [
        ("reshape.fresh", {}, "reshape.fresh is no way to tune"),
        ("hftt", {}, "unknown step 'tune.hftt'"),
        ("hft", {"nonsense": 1}, "nonsense"),
        ("c_rlft", {}, "tune=c_rlft cannot learn a task"),
        ("mix", {"methods": ["hft", "lora"]}, "hft does not work with adapters"),
    ],
)
def test_what_cannot_tune_is_refused_before_anything_is_measured(
    tune: str, settings: dict[str, Any], why: str, stories: Path, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learner, "accuracy", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match=why):
        sequence_of(tmp_path / "a", stories, tasks, tune, settings=settings)


def test_sentences_longer_than_the_context_lose_their_end_never_the_label_and_are_counted(
    stories: Path, tasks: list[str], tmp_path: Path
) -> None:
    rows = [{"sentence": "word " * n, "label": "Good"} for n in (2, 2, 200)]
    long = _json(tmp_path, {"train": rows, "test": rows[1:], "labels": ["Good", "Bad"]})
    (tmp_path / "a").mkdir()
    job = StepContext(tmp_path / "a", source=Checkpoint(stories), technique=registry.techniques_named)
    finding = continual(Knobs(tasks=[str(long), tasks[1]], train=replace(TRAIN, context=64)), job)
    assert finding.metrics["full"]["cut"][0] == {"train": 1, "test": 1}
    assert finding.tables[1]["rows"][0] == ["full", "some", 1, 1]
    learner = Learner(Checkpoint(stories), Train(context=64), tmp_path, 0)
    made = learner.rows([("word " * 200, "Bad")])
    assert int(made.lengths[0]) == 64 and learner.tokenizer.decode(made.ids[0]).endswith("\nAnswer: Bad")


@pytest.mark.parametrize("base", ["seedling", "stories"])
def test_exactly_the_label_is_learnt(base: str, shared: Path, request: Any, tmp_path: Path) -> None:
    learner = Learner(Checkpoint(base if base == "seedling" else request.getfixturevalue(base)), Train(context=256), tmp_path, 0)
    for file in sorted((shared / "cl15").glob("*.json")):
        for label in json.loads(file.read_text())["labels"]:
            rows = learner.rows([("what is it", label)])
            assert learner.tokenizer.decode(rows.ids[0][rows.labels[0] >= 0]).strip() == label
            assert rows.weights[0][rows.labels[0] >= 0].unique().tolist() == [1.0]


def test_accuracy_is_that_of_the_likeliest_label(stories: Path, tmp_path: Path) -> None:
    import torch

    task = Task(
        "t",
        [],
        [{"sentence": s, "label": x} for s, x in (("once upon a time", "dog"), ("a big tree", "cat"), ("he", "dog"))],
        ["dog", "cat"],
    )
    learner = Learner(Checkpoint(stories), Train(context=64, batch=1), tmp_path, 0)
    right = 0
    for r in task.test:
        made = [learner.rows([(r["sentence"], label)]) for label in task.labels]
        with torch.no_grad():
            logp = [learner.model(m.ids.long()).logits[0, :-1].log_softmax(-1) for m in made]
        score = [
            sum(float(p[k - 1, int(m.ids[0, k])]) for k in range(1, len(m.ids[0])) if m.labels[0, k] >= 0)
            for p, m in zip(logp, made, strict=True)
        ]
        right += task.labels[score.index(max(score))] == r["label"]
    assert learner.accuracy(task) == pytest.approx(100 * right / 3)


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_sequence_of_one_task_and_a_way_that_makes_its_own_rows_are_refused(stories: Path, tasks: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 task was given.*at least two"):
        sequence_of(tmp_path / "a", stories, tasks[:1])
    with pytest.raises(UserError, match="c_rlft cannot learn a task"):
        sequence_of(tmp_path / "b", stories, tasks, "c_rlft", settings={})
    with pytest.raises(UserError, match="did you mean 'tune.hft'"):
        sequence_of(tmp_path / "c", stories, tasks, "hftt")
    with pytest.raises(UserError, match="neither a matrix nor a model"):
        continual(Knobs(tasks=tasks), StepContext(tmp_path))
    with pytest.raises(UserError, match="an answer alone has"):
        sequence_of(tmp_path / "d", stories, tasks, train=Train(context=8))


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ("x", "does not parse"),
        ([], "has no 'train'"),
        ({"train": [1], "labels": ["a"]}, "has no 'test'"),
        ({"train": [{"sentence": "s", "label": "b"}], "test": [{"sentence": "s", "label": "a"}], "labels": ["a"]}, "has a row"),
        ({"train": [{"sentence": None, "label": "a"}], "test": [{"sentence": "s", "label": "a"}], "labels": ["a"]}, "has a row"),
        ({"train": ["s"], "test": [{"sentence": "s", "label": "a"}], "labels": ["a"]}, "has a row"),
        ({"train": [{"sentence": "s", "label": 1}], "test": [{"sentence": "s", "label": 1}], "labels": [1, 2]}, "labels"),
    ],
    ids=str,
)
def test_what_is_no_task_is_refused(raw: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        read_task(_json(tmp_path, raw), 10)
