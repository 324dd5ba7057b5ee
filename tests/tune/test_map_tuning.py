"""tune.map_tuning: a plug that changes nothing but what it is for, a map that alone moves, rows that serve the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modelwright
import tiny_bert
from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.testing import made
from modelwright.tune.entities.plug import EntityMap, Plug
from modelwright.tune.entities.vectors import Vectors
from modelwright.tune.hft import Hft
from modelwright.tune.hft import Knobs as HftKnobs
from modelwright.tune.map_tuning import HiddenMentions, HiddenWords, Knobs, MapTuning
from small import Fatal, far, go, same, weights

KINDS = ("llama", "qwen3", "gpt2", "gemma", "gemma3", "opt", "bert")
PLAIN = {"certificate": "structure"}


def entity_map(model: Any, offset: int = 96, n: int = 5, seed: int = 0) -> EntityMap:
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vectors = Vectors({f"Q{i}": i for i in range(n)}, torch.randn(n, 8, generator=g))
    return EntityMap(vectors, model.get_input_embeddings().weight.shape[1], offset)


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    out: Tensor = model(input_ids=tokens).logits
    return out


# ---- the plug ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_plugged_without_an_entity_and_unplugged_the_model_is_the_same_to_the_bit(kind: str) -> None:
    model = model_of(kind)
    before, names = logits(model, ids()), list(model.state_dict())
    plug = Plug(model, entity_map(model))
    assert torch.equal(logits(model, ids()), before)
    spliced = torch.where(torch.arange(9) == 3, 97, ids())
    assert not torch.allclose(logits(model, spliced), before)
    plug.remove()
    assert torch.equal(logits(model, ids()), before) and list(model.state_dict()) == names


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_mapped_onto_a_token_s_embedding_is_that_token(kind: str) -> None:
    model, token = model_of(kind), 41
    one = entity_map(model)
    with torch.no_grad():
        one.map.weight.zero_()
        one.map.bias.copy_(model.get_input_embeddings().weight[token])
    Plug(model, one)
    here = torch.arange(9) == 3
    assert torch.allclose(logits(model, torch.where(here, 97, ids())), logits(model, torch.where(here, token, ids())), atol=1e-5)


def test_every_place_gets_its_own_vector_as_a_loop_would_give_it() -> None:
    model = model_of("llama")
    plain = model.get_input_embeddings().weight
    plug = Plug(model, entity_map(model))
    tokens = torch.randint(90, 102, (3, 9), generator=torch.Generator().manual_seed(1))  # 101 stands for an entity without a vector
    out = model.get_input_embeddings()(tokens)
    for row, found in zip(tokens, out, strict=True):
        for t, vector in zip(row.tolist(), found, strict=True):
            e = plug.map.vectors[t - 96] if t >= 96 else None
            want = plain[t] if e is None else plug.map.map.weight @ e + plug.map.map.bias
            assert torch.allclose(vector, want, atol=1e-6)
    assert torch.equal(plug.map(torch.tensor([101]))[0], plug.map.map.bias), "f(0) = b"


def test_map_of_transe_into_bert_base_has_99072_parameters() -> None:
    one = EntityMap(Vectors({"Q1": 0}, torch.zeros(1, 128)), 768, 30522)
    assert sum(p.numel() for p in one.parameters()) == 99_072


def test_plug_goes_into_a_model_with_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of("llama"), LoraConfig(target_modules=["q_proj"]))
    before = logits(model, ids())
    plug = Plug(model, entity_map(model))
    assert torch.equal(logits(model, ids()), before)
    assert not torch.allclose(logits(model, torch.where(torch.arange(9) == 3, 97, ids())), before)
    plug.remove()


# ---- training ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return made("entities", tmp_path_factory.mktemp("entities"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]) -> Path:
    texts = [json.loads(line)["text"] for line in Path(given["data"]).read_text().splitlines()]
    return tiny_bert.saved(tmp_path_factory.mktemp("bert"), [*texts, "/ " * 40])


def trained(base: Any, given: dict[str, Any], folder: Path, stop: int | None = None, *more: Any, knobs: Any = None, **train: Any) -> Any:
    """The technique, the model after a run and its weights before."""
    technique, source = MapTuning(Knobs(vectors=given["vectors"], **(knobs or {}))), Checkpoint(base)
    model, tokenizer, settings = source.model(torch.float32), source.tokenizer(), Train(context=32)
    torch.manual_seed(3)
    objective = technique.objective(model, tokenizer, settings, 0)
    rows = technique.rows(Data(path=given["data"]), tokenizer, 0, settings, 0)
    before = weights(model)
    technique.objective = lambda *a: objective  # type: ignore[method-assign]
    try:
        go([technique, *more], model, folder, rows, stop, **{"eval_every": 50, "optimizer": "sgd", "lr": 0.1, **train})
    except Fatal:
        return None
    return technique, model, before


@pytest.mark.parametrize("base", ["bert", "seedling"])
def test_only_the_map_moves_and_no_weight_of_the_model_has_a_gradient(base: str, bert: Path, given: dict[str, Any], tmp_path: Path) -> None:
    technique, model, before = trained(bert if base == "bert" else base, given, tmp_path)
    after = weights(model)
    assert all(torch.equal(after[n], w) for n, w in before.items()) and len(after) == len(before) + 2
    assert all(p.grad is None for n, p in model.named_parameters() if "entity_map" not in n)
    torch.manual_seed(0)
    fresh = EntityMap(technique.vectors, technique.plug.map.map.out_features, 0)
    assert far(dict(technique.plug.map.named_parameters()), dict(fresh.named_parameters())) > 1e-6


@pytest.mark.slow
def test_accumulated_and_resumed_runs_are_the_whole_one(bert: Path, given: dict[str, Any], tmp_path: Path) -> None:
    still = {"knobs": {"dropout": 0.0}}
    whole = weights(trained(bert, given, tmp_path / "a", **still)[1])
    assert far(weights(trained(bert, given, tmp_path / "b", batch=2, accumulate=2, **still)[1]), whole) < 1e-5
    noisy = weights(trained(bert, given, tmp_path / "c", save_every=2)[1])
    assert not same(noisy, whole), "dropout is on while the map is learnt"
    assert trained(bert, given, tmp_path / "d", 3, save_every=2) is None
    assert same(weights(trained(bert, given, tmp_path / "d", save_every=2)[1]), noisy)


def test_dropout_is_put_back(bert: Path, given: dict[str, Any], tmp_path: Path) -> None:
    technique, model, _ = trained(bert, given, tmp_path / "a", knobs={"dropout": 0.4})
    shares = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert shares == {0.4}
    technique.export(model, tmp_path / "out")
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert not any("entity_map" in n for n in model.state_dict())


def test_a_model_trains_under_a_map_that_stays_with_half_fine_tuning_too(bert: Path, given: dict[str, Any], tmp_path: Path) -> None:
    technique, model, _ = trained(bert, given, tmp_path / "a")
    technique.export(model, tmp_path / "first")
    knobs = {"trains": "model", "map": str(tmp_path / "first"), "learn": "text"}
    second, model, before = trained(bert, given, tmp_path / "b", None, Hft(HftKnobs()), knobs=knobs)
    assert same(dict(second.plug.map.named_parameters()), dict(technique.plug.map.named_parameters()))
    after = weights(model)
    still = sum(torch.equal(after[n], w) for n, w in before.items())
    assert 0 < still < len(before)


def test_vectors_are_never_hidden_and_padding_neither(bert: Path, given: dict[str, Any]) -> None:
    technique = MapTuning(Knobs(vectors=given["vectors"], learn="text"))
    model, tokenizer, train = Checkpoint(bert).model(), Checkpoint(bert).tokenizer(), Train(context=32, mask_share=0.9)
    objective = technique.objective(model, tokenizer, train, 0)
    rows = technique.rows(Data(path=given["data"]), tokenizer, 0, train, 0)
    assert isinstance(objective, HiddenWords) and not isinstance(objective, HiddenMentions)
    batch = objective.collate([rows[i] for i in range(len(rows))])
    entities = batch["whole"] >= len(tokenizer)
    assert bool(entities.any()) and bool((batch["labels"][:, 1:][entities] == -100).all())
    assert torch.equal(batch["input_ids"][entities], batch["whole"][entities])


# ---- what is saved -----------------------------------------------------------------------------------------------------
def _run(base: Any, given: dict[str, Any], to: Path, **knobs: Any) -> Any:
    train = {"epochs": 1, "batch": 8, "context": 32, "lr": 1e-2, "warmup": 0.0, "eval_every": 50, "record": False}
    return modelwright.run("tune.map_tuning", base=base, to=to, train=train, save=PLAIN, **given, **knobs)


@pytest.mark.parametrize("base", ["bert", "seedling"])
def test_deployed_rows_give_the_plugged_model_s_logits_and_tokens(base: str, bert: Path, given: dict[str, Any], tmp_path: Path) -> None:
    source = Checkpoint(bert if base == "bert" else base)
    done = _run(source.folder, given, tmp_path / "rows", deploy=True)
    saved = Checkpoint(done.to)
    model, tokenizer, plain = saved.model(torch.float32).eval(), saved.tokenizer(), source.model(torch.float32).eval()
    one = EntityMap(
        MapTuning(Knobs(vectors=given["vectors"])).vectors, plain.get_input_embeddings().weight.shape[1], len(source.tokenizer())
    )
    one.load(str(done.to))
    Plug(plain, one)
    text = tokenizer("We saw the <entity:Q3> / drum today.", return_tensors="pt")["input_ids"]
    assert int(text.max()) == len(source.tokenizer()) + 3
    old, new = logits(plain, text), logits(model, text)
    words = len(source.tokenizer())  # the model may have more embeddings: entities take those that are free
    assert torch.allclose(old[..., :words], new[..., :words], atol=1e-5)
    if base == "bert":
        assert bool((new.softmax(-1)[..., words:] == 0).all())
    else:
        assert model.generation_config.suppress_tokens == list(range(words, words + 11))


def test_result_is_the_untouched_model_with_the_map_beside_it(given: dict[str, Any], tmp_path: Path) -> None:
    done = _run("seedling", given, tmp_path / "out")
    old, new = Checkpoint("seedling"), Checkpoint(done.to)
    assert all(torch.equal(old.get(n), new.get(n)) for n in old.table)
    assert len(list((tmp_path / "out").rglob("entity_map.safetensors"))) == 1
    assert done.steps[0]["facts"]["data"]["mentions without a vector"] == 2
    assert "all of the map" in done.steps[0]["liveness"][0]


# ---- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"vectors": "nowhere.npz"}, "no vectors at"),
        ({"trains": "model"}, "there is no map"),
        ({"map": "nowhere"}, "no map at"),
        ({"dropout": 1.0}, "out of range"),
        ({"train": {"context": 4}}, "no sentence has anything to learn"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(knobs: dict[str, Any], words: str, given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        modelwright.run("tune.map_tuning", base="seedling", to=tmp_path / "out", **{**given, **knobs})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_encoder_decoder_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="does not fit T5"):
        MapTuning(Knobs(vectors=given["vectors"])).objective(model_of("t5"), object(), Train(), 0)
