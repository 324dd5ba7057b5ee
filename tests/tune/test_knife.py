"""tune.knife: what the bottleneck lets through, what a score is, what a student learns from, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modelwright
import tiny_t5
from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.technique import LossTerm
from modelwright.testing import made
from modelwright.tune.choices import teacher as teachers
from modelwright.tune.choices.rows import ChoiceRows, Columns, Tokens, encode, read_questions
from modelwright.tune.choices.scoring import ChoiceOutputs, ChoiceScores
from modelwright.tune.hft import Hft
from modelwright.tune.hft import Knobs as HftKnobs
from modelwright.tune.knife import Knife, Knobs, Taught
from small import Fatal, far, go, same, weights

DECODERS = ("llama", "qwen2", "qwen3", "gpt2")
T5 = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}
TRAIN = {"epochs": 1, "batch": 8, "context": 64, "lr": 1e-2, "eval_every": 50, "warmup": 0.0, "record": False}


class Letters:
    """A tokenizer of characters."""

    eos_token_id, bos_token_id = 1, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 90 + 3 for c in text]}


def ids(*sizes: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (n,), generator=g) for n in sizes]


def rows(rationale: int = 4, n: int = 4, seed: int = 0) -> ChoiceRows:
    """Questions of several lengths with two or three answers."""
    items = []
    for i in range(n):
        x, r, *y = ids(3 + i, rationale, 1, 2 + i % 2, 3, seed=seed + i)
        items.append(Tokens(x, r, y[: 2 + i % 2], i % 2))
    return ChoiceRows(items, list(range(n)), 24)


def scored(model: Any, data: ChoiceRows, which: list[int] | None = None, **how: bool) -> ChoiceOutputs:
    objective = ChoiceScores(model, Letters(), **{"rationale": True, "bottleneck": True, **how})
    batch = objective.collate([data[i] for i in (which or range(len(data)))])
    objective.install(model)
    try:
        return objective.forward(model, batch, LossTerm().weights(batch))
    finally:
        objective.remove()


def model_for(kind: str, **changes: Any) -> Any:
    return model_of(kind, **(T5 if kind.startswith("t5") else {}), **changes)


# ---- the bottleneck ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("open_", [False, True], ids=["closed", "open"])
def test_answers_get_no_gradient_from_the_encoder_s_states_of_the_rationale(open_: bool) -> None:
    model, kept = model_for("t5"), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, out: Any) -> None:
            kept[name] = out[0] if not isinstance(out, Tensor) else out
            kept[name].retain_grad()

        return hook

    model.encoder.register_forward_hook(keep("states"))
    model.encoder.embed_tokens.register_forward_hook(lambda m, a, o: keep("read")(m, a, o) if "read" not in kept else None)
    out = scored(model, rows(), [1], bottleneck=not open_)
    out.scores.sum().backward()  # type: ignore[union-attr]
    x = len(rows()[1]["input_ids"])
    assert bool((kept["states"].grad[:, x:] != 0).any()) == open_
    assert bool((kept["read"].grad[:, x:] != 0).all()), "the rationale is read by the encoder"


@pytest.mark.parametrize("kind", DECODERS)
def test_answers_of_a_decoder_learn_of_the_rationale_through_the_question_alone(kind: str) -> None:
    deep = {"n_layer": 1} if kind == "gpt2" else {"num_hidden_layers": 1}
    a, b = rows(seed=0), rows(seed=0)
    b.items = [Tokens(t.x, u.r, t.y, t.gold) for t, u in zip(a.items, rows(seed=9).items, strict=True)]
    one, two = model_for(kind, **deep), model_for(kind)
    assert torch.equal(scored(one, a).scores, scored(one, b).scores), "one layer: nobody has told the question yet"  # type: ignore[arg-type]
    assert not torch.allclose(scored(one, a, bottleneck=False).scores, scored(one, b, bottleneck=False).scores)  # type: ignore[arg-type]
    assert not torch.allclose(scored(two, a).scores, scored(two, b).scores)  # type: ignore[arg-type]


# ---- scores ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["t5", "t5_v1_1", *DECODERS])
def test_without_a_rationale_a_score_is_the_stock_model_s_mean_log_likelihood(kind: str) -> None:
    model, data = model_for(kind), rows(rationale=0)
    found = scored(model, data).scores
    cue = torch.tensor(Letters()("\nAnswer:")["input_ids"])
    for i, item in enumerate(data.items):
        for k, y in enumerate(item.y):
            if kind.startswith("t5"):
                logits = model(input_ids=item.x[None], labels=y[None]).logits[0]
            else:
                logits = model(input_ids=torch.cat([item.x, cue, y])[None]).logits[0, len(item.x) + len(cue) - 1 : -1]
            want = logits.log_softmax(-1).gather(1, y[:, None]).mean()
            assert float((found[i, k] - want).abs().detach()) < 2e-5  # type: ignore[index]
        assert bool((found[i, len(item.y) :] == float("-inf")).all())  # type: ignore[index]


@pytest.mark.parametrize("kind", ["t5", "gpt2", "qwen3"])
def test_padding_and_neighbours_change_no_score(kind: str) -> None:
    model, data = model_for(kind), rows()
    whole = scored(model, data).scores
    for i in range(len(data)):
        alone = scored(model, data, [i]).scores
        n = len(data.items[i].y)
        assert torch.allclose(whole[i, :n], alone[0, :n], atol=2e-5)  # type: ignore[index]


def test_eager_attention_gives_the_scores_of_sdpa() -> None:
    a, b = model_for("llama"), model_for("llama")
    b.set_attn_implementation("eager")
    assert torch.allclose(scored(a, rows()).scores, scored(b, rows()).scores, atol=1e-5)  # type: ignore[arg-type]


def test_an_open_cross_attention_is_stock_t5_on_question_and_rationale() -> None:
    model, data = model_for("t5"), rows()
    item = data.items[0]
    logits = model(input_ids=torch.cat([item.x, item.r])[None], labels=item.y[1][None]).logits[0]
    want = logits.log_softmax(-1).gather(1, item.y[1][:, None]).mean()
    assert float((scored(model, data, bottleneck=False).scores[0, 1] - want).abs().detach()) < 2e-5  # type: ignore[index]


# ---- the student -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(made("questions", tmp_path_factory.mktemp("questions"))["data"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, questions: str) -> Path:
    texts = [" ".join(map(str, json.loads(line).values())) for line in Path(questions).read_text().splitlines()]
    return tiny_t5.saved(tmp_path_factory.mktemp("t5"), texts)


def student(base: Path, questions: str, context: int = 64, **knobs: Any) -> tuple[Knife, Any, ChoiceRows]:
    """A student that is its own teacher, and its rows."""
    source = Checkpoint(base)
    technique = Knife(Knobs(**{"way": "student", "states": "fp32", **knobs}))
    technique.source = source
    model = source.model(torch.float32)
    train = Train(**{**TRAIN, "context": context})
    objective = technique.objective(model, source.tokenizer(), train, 0)
    assert isinstance(objective, Taught) == (technique.knobs.way == "student")
    return technique, model, technique.rows(Data(path=questions), source.tokenizer(), 200, train, 0)


@pytest.mark.parametrize("kd_out", ["mse", "kl"])
def test_student_equal_to_the_teacher_is_at_distance_0_without_rationales_alone(base: Path, questions: str, kd_out: str) -> None:
    technique, model, data = student(base, questions, kd_out=kd_out)
    bare = ChoiceRows([Tokens(t.x, t.r[:0], t.y, t.gold) for t in data.items], data.at, data.width)
    distances = []
    for some in (bare, data):
        taught = technique.prepare(some)
        objective = technique.objective(model.eval(), Checkpoint(base).tokenizer(), Train(), 0)
        batch = objective.collate([taught[i] for i in range(5)])
        objective.install(model)
        out = objective.forward(model, batch, LossTerm().weights(batch))
        objective.remove()
        distances.append([float(t.sums(batch, out).sum().detach() / t.count(batch)) for t in technique.terms()])
    assert max(distances[0]) < 1e-9 and min(distances[1]) > 1e-5


def test_teacher_is_read_once_and_never_changed(base: Path, questions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    technique, model, data = student(base, questions, states="fp16")
    before, times = (base / "model.safetensors").read_bytes(), []
    whole = teachers._write
    monkeypatch.setattr(teachers, "_write", lambda *a: (times.append(1), whole(*a)))
    first, second = technique.prepare(data), technique.prepare(data)
    assert len(times) == 1 and torch.equal(first[3]["x_taught"], second[3]["x_taught"])
    assert (base / "model.safetensors").read_bytes() == before
    a, b = first.split(10)
    assert len(b) == len(data) - 10 and torch.equal(b[2]["y_taught"], first[12]["y_taught"])


def trained(base: Path, questions: str, folder: Path, stop: int | None = None, *more: Any, way: str = "student", **train: Any) -> Any:
    """The weights after a run, before it, and its outcome."""
    technique, model, data = student(base, questions, way=way)
    before = weights(model)
    try:
        done = go([technique, *more], model, folder, data, stop, **{"optimizer": "sgd", "lr": 0.05, "eval_every": 50, **train})
    except Fatal:
        return None
    return weights(model), before, done


def test_accumulated_and_resumed_runs_are_the_whole_one(base: Path, questions: str, tmp_path: Path) -> None:
    whole = trained(base, questions, tmp_path / "a", save_every=2)[0]
    assert far(trained(base, questions, tmp_path / "b", batch=2, accumulate=2)[0], whole) < 1e-5
    assert trained(base, questions, tmp_path / "c", 3, save_every=2) is None
    assert same(trained(base, questions, tmp_path / "c", save_every=2)[0], whole)


def test_both_steps_run_as_one_recipe_and_the_student_begins_as_the_base(base: Path, questions: str, tmp_path: Path) -> None:
    common = {"data": questions, "train": TRAIN}
    raw = {
        "base": str(base),
        "steps": [{"tune.knife": {"way": "teacher", **common}}, {"tune.knife": {"way": "student", "student": str(base), **common}}],
        "save": {"to": str(tmp_path / "out"), "certificate": "structure"},
    }
    from modelwright.runner import recipe
    from modelwright.runner.run import run_recipe

    result = run_recipe(recipe.parse(raw, Path.cwd(), "knife"))
    first, second = (s["evals"][0] for s in result.steps)
    assert {"accuracy", "loss"} <= second.keys() and result.to is not None
    assert type(Checkpoint(result.to).model()).__name__ == "T5ForConditionalGeneration"
    assert first["loss"] != second["loss"], "one reads rationales and the other does not"


@pytest.mark.parametrize("way", ["i_o", "ir_o", "i_ro"])
def test_baselines_train_on_the_same_data(base: Path, questions: str, way: str, tmp_path: Path) -> None:
    after, before, done = trained(base, questions, tmp_path / "out", way=way)
    assert not same(after, before) and done.log[-1]["loss"] > 0


def test_input_with_rationale_is_evaluated_without_one() -> None:
    model, data = model_for("t5"), rows()
    inside = scored(model.eval(), data, bottleneck=False, absent=True).scores
    assert torch.equal(inside, scored(model, data, rationale=False, bottleneck=False).scores)  # type: ignore[arg-type]
    assert not torch.equal(inside, scored(model.train(), data, bottleneck=False, absent=True).scores)  # type: ignore[arg-type]


def test_knife_goes_with_half_fine_tuning(base: Path, questions: str, tmp_path: Path) -> None:
    after, before, _ = trained(base, questions, tmp_path / "out", None, Hft(HftKnobs()))
    still = {n for n in after if torch.equal(after[n], before[n])}
    assert len(after) // 3 < len(still) < len(after), "half of the matrices are frozen"


# ---- reading -----------------------------------------------------------------------------------------------------------
def _file(folder: Path, *table: dict[str, Any]) -> Data:
    (folder / "q.json").write_text(json.dumps(table))
    return Data(path=str(folder / "q.json"))


def test_layouts_of_the_usual_sets_are_read(tmp_path: Path) -> None:
    hub = {"choices": {"label": ["A", "B"], "text": ["ice", "fire"]}, "answer": "B"}
    table = [{"question": "hot?", **hub, "facts": ["Fire burns. ", "Ice melts."]}, {"question": "cold?", **hub, "answer": 0, "facts": ""}]
    found, counts = read_questions(_file(tmp_path, *table), Columns(rationale="facts", prompt="{question} {choices}"), True)
    assert [q.gold for q in found] == [1, 0] and found[0].prompt == "hot? (a) ice (b) fire"
    assert found[0].rationale == "Fire burns. Ice melts." and counts == {"questions": 2, "without a rationale": 1}
    yes, _ = read_questions(_file(tmp_path, {"question": "q", "answer": True}), Columns(), False)
    assert yes[0].choices == ["no", "yes"] and yes[0].gold == 1


def test_question_has_the_same_tokens_with_and_without_a_rationale(base: Path, questions: str) -> None:
    tokenizer, columns = Checkpoint(base).tokenizer(), Columns()
    found, _ = read_questions(Data(path=questions), columns, True)
    a = encode(found, tokenizer, 64, True)
    b = encode([type(q)(q.prompt, q.choices, q.gold, "") for q in found], tokenizer, 64, True)
    assert all(torch.equal(p.x, q.x) for p, q in zip(a.items, b.items, strict=True))
    short = encode(found, tokenizer, max(len(t.x) for t in a.items) + 1, True)
    assert short.facts["rationales cut"] > 0 and max(len(t.x) + len(t.r) for t in short.items) <= short.width


Q = {"question": "q", "choices": ["a", "b"], "answer": 0, "rationale": "r"}


@pytest.mark.parametrize(
    ("row", "knobs", "words"),
    [
        ({"rationale": ""}, {}, "is empty"),
        ({"rationale": None}, {}, "is empty"),
        ({}, {"rationale": "facts"}, "no column 'facts'"),
        ({"answer": "c"}, {}, "has the answer"),
        ({"answer": 2}, {}, "has the answer"),
        ({"choices": ["a"]}, {}, "different choices"),
        ({"choices": ["a", "a"]}, {}, "different choices"),
        ({"choices": "a"}, {}, "no list of choices"),
        ({"question": " "}, {}, "no question"),
        ({"question": "q" * 200}, {}, "no question fits"),
        ({}, {"student": "seedling"}, "student is given"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(row: dict[str, Any], knobs: dict[str, Any], words: str, base: Path, tmp_path: Path) -> None:
    data = _file(tmp_path, {**Q, **row})
    with pytest.raises(UserError, match=words) as caught:
        modelwright.run("tune.knife", base=base, to=tmp_path / "out", data=data.path, way="teacher", train=TRAIN, **knobs)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_checkpoint_without_a_tokenizer_is_refused(tiny: Any, questions: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        modelwright.run("tune.knife", base=tiny("llama"), to=tmp_path / "out", data=questions, way="teacher", train=TRAIN)


def test_student_with_fewer_layers_learns_from_the_teacher(base: Path, questions: str, tmp_path: Path) -> None:
    texts = [" ".join(map(str, json.loads(line).values())) for line in Path(questions).read_text().splitlines()]
    small = tiny_t5.saved(tmp_path / "small", texts, num_layers=1, num_decoder_layers=1)
    knobs = {"way": "student", "student": str(small), "train": TRAIN, "save": {"certificate": "structure"}}
    done = modelwright.run("tune.knife", base=base, to=tmp_path / "out", data=questions, **knobs)
    assert Checkpoint(done.to).hf_config.num_layers == 1


def test_student_of_another_kind_is_refused(base: Path, questions: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the student is a"):
        modelwright.run("tune.knife", base=base, to=tmp_path / "out", data=questions, way="student", student="seedling", train=TRAIN)
    with pytest.raises(UserError, match="l_in and l_out are 0"):
        Knife(Knobs(way="student", l_in=0, l_out=0))
