"""tune.mix: several methods in one step do what each does alone; what does not go together is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelwright
from families import model_of
from modelwright import registry
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.runner import recipe
from modelwright.tune.c_rlft import CRlft
from modelwright.tune.c_rlft import Knobs as CRlftKnobs
from modelwright.tune.hft import Hft
from modelwright.tune.hft import Knobs as HftKnobs
from modelwright.tune.lora import Knobs as LoraKnobs
from modelwright.tune.lora import Lora
from modelwright.tune.migu import Knobs as MiguKnobs
from modelwright.tune.migu import Migu
from small import Fatal, go, moved, rows, same, weights

TWO: dict[str, Any] = {"weights": {"good": 1.0, "bad": 0.1}, "conditions": {"good": "Good", "bad": "Bad"}}


def chats(folder: Path) -> Path:
    file = folder / "chats.jsonl"
    lines = [
        {
            "messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i + 1} " * (1 + i % 3)}],
            "source": ("good", "bad")[i % 2],
        }
        for i in range(16)
    ]
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return file


def hft() -> Hft:
    return Hft(HftKnobs())


def migu(**knobs: Any) -> Migu:
    return Migu(MiguKnobs(**knobs))


# ---- together as alone -----------------------------------------------------------------------------------------------
def test_half_fine_tuning_with_weighted_chats_freezes_the_same_half_and_is_conditioned_training_of_it(tmp_path: Path) -> None:
    def conditioned() -> tuple[CRlft, Any]:
        technique = CRlft(CRlftKnobs(**TWO))
        made = technique.rows(Data(path=str(chats(tmp_path))), Checkpoint("seedling").tokenizer(), 2048, Train(context=64), 0)
        return technique, made

    found = []
    for i in range(3):
        technique, made = conditioned()
        model, chosen = model_of("llama", vocab_size=2048), hft()
        if i == 2:  # the selector alone, on the same rows and the same enlarged model
            technique.attach(model, Anatomy(model))
        before = weights(model)
        out = go([[chosen, technique], [technique, chosen], [chosen]][i], model, tmp_path / str(i), made)
        assert {n for n, p in out.model.named_parameters() if torch.equal(p, before[n])} == chosen.frozen.keys()
        found.append(weights(out.model))
    assert same(found[0], found[2]) and same(found[1], found[2]) and found[0]["lm_head.weight"].shape[0] == 2049


@pytest.mark.parametrize("turned", [False, True])
def test_update_rule_beside_a_selector_masks_what_is_left_and_freezes_the_same(turned: bool, tmp_path: Path) -> None:
    model, first, second = model_of("llama"), hft(), migu(guard="update")
    before = weights(model)
    out = go([second, first] if turned else [first, second], model, tmp_path, epochs=1, batch=8, weight_decay=0.1)
    assert not set(first.frozen) & moved(out.model, before)
    alone = migu(guard="update")
    go(alone, model_of("llama"), tmp_path / "alone", epochs=1, batch=8)
    assert all(torch.equal(m, alone.masks[n]) for n, m in second.masks.items())
    for n, m in second.masks.items():
        rows_moved = (out.model.get_parameter(n) != before[n]).any(1)
        assert torch.equal(rows_moved, m & (n not in first.frozen))


def test_masked_adapters_move_by_rows_and_the_base_stays(tmp_path: Path) -> None:
    model = model_of("llama")
    before, technique, adapters = weights(model), migu(guard="update"), Lora(LoraKnobs(roles=["attn.v", "ffn.down"]))
    out = go([technique, adapters], model, tmp_path, epochs=1, batch=8)
    assert "8 matrices" in out.liveness[0] and set(out.facts) == {"migu"}
    for n, p in out.model.named_parameters():
        if "lora_B" in n:
            mask = technique.masks[n.removeprefix("base_model.model.")]
            assert torch.equal(p.any(1), mask)  # B begins at zero
        elif "lora_" not in n:
            assert torch.equal(p, before[n.removeprefix("base_model.model.").replace(".base_layer", "")])
    turned = go([Lora(LoraKnobs(roles=["attn.v", "ffn.down"])), migu(guard="update")], model_of("llama"), tmp_path / "b", epochs=1, batch=8)
    assert same(weights(turned.model), weights(out.model))


def test_a_mask_of_nothing_beside_adapters_is_adapters_alone(tmp_path: Path) -> None:
    a = go([migu(threshold=0.0), Lora(LoraKnobs())], model_of("llama"), tmp_path / "a", epochs=3)
    b = go(Lora(LoraKnobs()), model_of("llama"), tmp_path / "b", epochs=3)
    assert same(weights(a.model), weights(b.model))


def test_new_token_beside_adapters_keeps_its_mean_embedding_through_merging(tmp_path: Path) -> None:
    technique, adapters, model = CRlft(CRlftKnobs(**TWO)), Lora(LoraKnobs()), model_of("llama", vocab_size=2048)
    made = technique.rows(Data(path=str(chats(tmp_path))), Checkpoint("seedling").tokenizer(), 2048, Train(context=64), 0)
    mean = model.lm_head.weight.detach().mean(0)
    for i, listed in enumerate(([technique, adapters], [Lora(LoraKnobs()), technique])):
        out = go(listed, model_of("llama", vocab_size=2048), tmp_path / str(i), made)
        final = out.model
        for t in listed:
            final = t.export(final, tmp_path / str(i))
        assert final.lm_head.weight.shape[0] == 2049 and torch.allclose(final.lm_head.weight[2048], mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_resumed_mix_is_equal_to_the_bit(kind: str, tmp_path: Path) -> None:
    def run(folder: str, stop: int | None = None) -> Any:
        listed = [hft(), migu(leak_every=2)]
        return go(listed, model_of(kind), tmp_path / folder, rows(12), stop, batch=2, accumulate=2, epochs=3, save_every=3)

    want = run("a")
    with pytest.raises(Fatal):
        run("b", stop=5)
    got = run("b")
    assert same(weights(got.model), weights(want.model)) and got.facts == want.facts


# ---- recipes and the runner ------------------------------------------------------------------------------------------
def test_short_form_of_a_recipe_is_the_mix(tmp_path: Path) -> None:
    short = recipe.parse({"base": "seedling", "steps": [{"tune": ["hft", {"migu": {"guard": "update"}}]}]})
    long = recipe.parse({"base": "seedling", "steps": [{"tune.mix": {"methods": ["hft", {"migu": {"guard": "update"}}]}}]})
    assert short.plain() == long.plain()
    (a, _), (b, knobs) = registry.mixed(short.steps[0].knobs)
    assert (a.name, b.name, knobs.guard) == ("tune.hft", "tune.migu", "update")


def test_mix_of_a_recipe_trains_with_both_and_the_round_counts(tmp_path: Path) -> None:
    made = modelwright.run(
        "tune.mix",
        base="seedling",
        to=tmp_path / "out",
        methods=["hft", {"c_rlft": TWO}],
        data=str(chats(tmp_path)),
        train={"context": 64, "batch": 2, "lr": 1e-2, "tokens": 200, "warmup": 0.0},
    )
    entry = made.steps[0]
    assert [line.split(":")[0] for line in entry["liveness"]] == ["hft", "c_rlft"]
    assert entry["facts"]["hft"]["frozen tensors"] > 0 and entry["facts"]["data"]["chats"] == 16
    saved = Checkpoint(made.to)
    assert saved.tokenizer().convert_tokens_to_ids("<|end_of_turn|>") == 2048 and saved.hf_config.vocab_size == 2049
    assert "Good Assistant:" in saved.tokenizer().apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        (["hftt"], "unknown step 'tune.hftt'.*did you mean 'tune.hft'"),
        ([{"migu": {"gard": "update"}}], "methods.migu.gard.*did you mean 'guard'"),
        ([{"migu": {"guard": "updat"}}], "methods.migu.guard='updat' is not a choice.*did you mean 'update'"),
        (["reshape.upcycle"], "reshape.upcycle is no way to tune, because it does not train"),
        (["mix"], "methods has 'mix'"),
        ([3], "methods has 3"),
        ([{"hft": {}, "migu": {}}], "methods has"),
        ([{"hft": {"train": {"lr": 1}}}], "methods.hft has train, because data and training are shared"),
        (["hft", "lora"], "hft does not work with adapters"),
        (["lora", "hft"], "hft does not work with adapters"),
        (["tune.mix"], "methods has"),
        ([], "tune.mix has no methods"),
    ],
    ids=str,
)
def test_methods_that_cannot_be_mixed_are_refused(methods: list[Any], match: str, tiny: Any, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]}) + "\n" for i in range(6)))
    with pytest.raises(UserError, match=match):
        modelwright.run(
            "tune.mix", base=tiny("llama"), to=tmp_path / "out", methods=methods, data=str(data), train={"context": 16, "tokens": 64}
        )
    assert not (tmp_path / "out").exists()
