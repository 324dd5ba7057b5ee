"""reshape.edit: the fact is learnt, only the chosen matrices of one layer move, and the scores are what they say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import SEEDLING, Checkpoint
from modelwright.reshape import edit as module
from modelwright.reshape.edit import Knobs, edit, learn, log_likelihood, read_fact, scores
from small import moved, weights

FACT: dict[str, Any] = {
    "prompt": "The home of the author is",
    "new": "Paris",
    "true": "the moon",
    "paraphrases": ["Home of the author:", "The author lives in"],
    "neighbours": ["The home of the reader is"],
}


@pytest.fixture(scope="module")
def seedling() -> Checkpoint:
    return Checkpoint("seedling")


@pytest.fixture
def fact(tmp_path: Path) -> str:
    (tmp_path / "fact.json").write_text(json.dumps(FACT))
    return str(tmp_path / "fact.json")


@pytest.mark.parametrize("part", ["keys", "gate", "up", "values"])
def test_efficacy_rises_and_only_the_chosen_part_of_the_chosen_layer_moves(part: str, seedling: Checkpoint, fact: str) -> None:
    made, promise = edit(seedling, Knobs(fact=fact, part=part, layer=1, steps=60, lr=1e-2, confidence=0.3))  # type: ignore[arg-type]
    names = {"keys": ("gate_proj", "up_proj"), "gate": ("gate_proj",), "up": ("up_proj",), "values": ("down_proj",)}[part]
    assert moved(made.model, weights(seedling.model())) == {f"model.layers.1.mlp.{n}.weight" for n in names}
    assert made.facts["before"]["efficacy"] == 0 and made.facts["after"]["efficacy"] == 1 and promise == "changed function"
    assert 0 < made.facts["steps"] < 60  # stopped when confident
    p = log_likelihood(made.model.float(), seedling.tokenizer(), [FACT["prompt"]], FACT["new"]).exp()
    assert float(p.detach()) >= 0.29 and made.facts["layer"] == 1


@pytest.mark.parametrize("part", ["gate", "keys", "up", "values"])
@pytest.mark.parametrize("kind", ["phi3", "gpt2", "mixtral", "opt"])
def test_other_rows_of_a_fused_or_stacked_matrix_stay(kind: str, part: str) -> None:
    model = model_of(kind)
    if part == "gate" and kind in ("gpt2", "opt"):
        with pytest.raises(UserError, match="no gate"):
            learn(model, Chars(), FACT, Knobs(fact="", part="gate"))
        return
    before, of = weights(model), Anatomy(model)
    learn(model, Chars(), FACT, Knobs(fact="", part=part, layer=0, steps=2, confidence=1.0))  # type: ignore[arg-type]
    roles = {"gate": ("gate",), "up": ("up",), "keys": ("gate", "up"), "values": ("down",)}[part]
    for p in of:
        chosen = p.layer == 0 and p.role.split(".")[0] in ("ffn", "expert")
        old, new = before[p.name], model.get_parameter(p.name).detach()
        for piece, spans in (p.rows or {p.role.split(".")[-1]: (slice(None),)}).items():
            for s in spans:
                same = torch.equal(old[..., s, :], new[..., s, :]) if old.dim() > 1 else torch.equal(old, new)
                assert same != (chosen and piece in roles), (p.name, piece)


class Chars:
    """A tokenizer of characters."""

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": [self(t)["input_ids"] for t in text] if isinstance(text, list) else [ord(c) % 90 + 3 for c in text]}


@pytest.mark.parametrize("norm", [1e-4, 2e-3])
def test_no_weight_changes_by_more_than_the_norm(norm: float, seedling: Checkpoint, fact: str) -> None:
    made, _ = edit(seedling, Knobs(fact=fact, part="values", norm=norm, steps=8, lr=5e-3, confidence=1.0))
    before = weights(seedling.model(torch.float32))
    after = weights(learned := made.model.float())
    name = next(iter(moved(learned, before)))
    assert 0.5 * norm < float((after[name] - before[name]).abs().max()) <= norm * 1.001


def test_a_known_fact_is_left_alone(seedling: Checkpoint, fact: str) -> None:
    made, _ = edit(seedling, Knobs(fact=fact, confidence=0.0))
    assert made.facts["steps"] == 0 and made.facts["moved weights"] == 0 and not moved(made.model, weights(seedling.model()))
    assert made.facts["layer"] == len(Anatomy(made.model).blocks) // 2


# ---- scores ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", ["seedling", "stories"])
@torch.no_grad()
def test_likelihood_is_that_of_the_whole_text_one_prompt_at_a_time(base: str, request: Any) -> None:
    source = Checkpoint(SEEDLING if base == "seedling" else request.getfixturevalue("stories"))
    model, tokenizer = source.model(torch.float32).eval(), source.tokenizer()
    prompts = ["Once upon a time", "The little dog was very", "He is"]
    got = log_likelihood(model, tokenizer, prompts, "happy")
    for prompt, value in zip(prompts, got, strict=True):
        head, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + " happy")["input_ids"]
        assert whole[: len(head)] == head and len(whole) > len(head)
        logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        want = sum(float(logp[i - 1, whole[i]]) for i in range(len(head), len(whole)))
        assert float(value) == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(
    ("new", "true", "want"),
    [
        ([2, 2, 0], [1, 1, 1], {"efficacy": 1.0, "paraphrase": 1.0, "locality": 1.0, "score": 1.0}),
        ([2, 0, 2], [1, 1, 1], {"efficacy": 1.0, "paraphrase": 0.0, "locality": 0.0, "score": 0.0}),
        ([2, [2, 0], [2, 0, 0, 0]], [1, 1, 1], {"efficacy": 1.0, "paraphrase": 0.5, "locality": 0.75, "score": 3 / (1 + 2 + 4 / 3)}),
    ],
)
def test_score_is_the_harmonic_mean(new: Any, true: Any, want: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [FACT["prompt"]], ["a"] * len(_list(new[1])), ["b"] * len(_list(new[2]))
    values = {"new": new, "true": true}

    def known(model: Any, tokenizer: Any, prompts: list[str], answer: str) -> torch.Tensor:
        given = _list(values[answer][groups.index(prompts)])
        return torch.tensor([float(x) for x in given] if len(given) == len(prompts) else [float(given[0])] * len(prompts))

    monkeypatch.setattr(module, "log_likelihood", known)
    got = scores(
        torch.nn.Linear(1, 1),
        None,
        {"prompt": FACT["prompt"], "paraphrases": groups[1], "neighbours": groups[2], "new": "new", "true": "true"},
    )
    assert got == pytest.approx(want)


def _list(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def test_groups_without_prompts_are_left_out_of_the_mean(seedling: Checkpoint) -> None:
    assert scores(seedling.model(), seedling.tokenizer(), FACT | {"paraphrases": [], "neighbours": []}).keys() == {"efficacy", "score"}


def test_scores_after_are_those_of_the_weights_that_are_saved(fact: str, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(SEEDLING, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    Checkpoint(SEEDLING).model().to(torch.bfloat16).save_pretrained(folder)
    source = Checkpoint(folder)
    seen: list[str] = []
    real = module.log_likelihood
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "log_likelihood", lambda m, *a: (seen.append(str(m.dtype)), real(m, *a))[1])
        made, _ = edit(source, Knobs(fact=fact, steps=2))
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    want = scores(made.model, source.tokenizer(), FACT)
    assert made.facts["after"] == want and seen[-1] == "torch.bfloat16"


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("not json", "no json object"),
        ("[1]", "no 'prompt'"),
        ('{"prompt": "a", "new": "b"}', "no 'true'"),
        ('{"prompt": "a", "new": "", "true": "c"}', "no 'new'"),
        ('{"prompt": "a", "new": "b", "true": 3}', "no 'true'"),
        ('{"prompt": "a", "new": "b", "true": "c", "paraphrases": "one text"}', "paraphrases"),
        ('{"prompt": "a", "new": "b", "true": "c", "neighbours": [3]}', "neighbours"),
        ('{"prompt": "a", "new": "b", "true": "c", "neighbors": ["d"]}', "did you mean 'neighbours'"),
    ],
)
def test_what_is_no_fact_is_refused(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError, match=match):
        read_fact(tmp_path / "f.json")
    with pytest.raises(UserError, match="no json object"):
        read_fact(tmp_path / "absent.json")


def test_layer_beyond_the_last_is_refused(seedling: Checkpoint, fact: str) -> None:
    with pytest.raises(UserError, match="layer=99 but the model has"):
        edit(seedling, Knobs(fact=fact, layer=99))


def test_checkpoint_without_tokenizer_is_refused(tiny: Any, fact: str) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        edit(Checkpoint(tiny("llama")), Knobs(fact=fact))
