"""tune.full and tune.lora from a checkpoint to a checkpoint: what moves, what must not, and what other libraries make of the result."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import modelwright
from modelwright.core.data.rows import Rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train import loop as training
from modelwright.core.train.loop import Outcome, fit
from modelwright.tune import lora

KINDS = ["llama", "qwen2", "qwen3", "gpt2", "mixtral"]
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "mixtral": transformers.MixtralForCausalLM,
}


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections() -> Iterator[None]:
    # The trainer collects garbage at each start; what torch and transformers imported need not be walked every time.
    import gc

    import families  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 96, (16, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def data(ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows of token ids as a table with two columns."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps({"number": i, "input_ids": row}) + "\n" for i, row in enumerate(ids.tolist())))
    return file


@torch.no_grad()
def logits(model: Any, of: Tensor) -> Tensor:
    return model.eval()(input_ids=of).logits


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def weights(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def step(result: Path) -> Path:
    return next((result / "steps").iterdir())


# ---- through the runner ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_result_loads_in_the_stock_class_and_differs_from_the_base(
    method: str, kind: str, tiny: Any, data: Path, ids: Tensor, tmp_path: Path
) -> None:
    base = tiny(kind)
    result = modelwright.run(
        f"tune.{method}",
        base=base,
        to=tmp_path / "out",
        data={"path": data, "column": "input_ids"},
        train={"batch": 5, "context": 12, "lr": 1e-2, "epochs": 1},
    )
    facts = result.steps[0]["facts"]
    assert facts["steps"] == 3 and facts["data"]["rows"] == 16 and facts["reload_max_abs_dlogit"] <= 1e-5
    tuned, info = CLASSES[kind].from_pretrained(result.to, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert apart(logits(tuned, ids), logits(CLASSES[kind].from_pretrained(base), ids)) > 1e-3
    assert json.loads((result.to / "config.json").read_text())["architectures"] == [CLASSES[kind].__name__]
    assert (step(result.to) / "dynamics.parquet").is_file() and (step(result.to) / "adapter").is_dir() == (method == "lora")
    assert result.certificate and result.certificate["loads_in"] == CLASSES[kind].__name__ and result.certificate["promise"] == "trained"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_same_seed_gives_the_same_bytes_and_another_seed_others(method: str, tiny: Any, data: Path, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = modelwright.run(
            f"tune.{method}", base=tiny("llama"), to=tmp_path / name, seed=seed, data=str(data), train={"context": 12, "lr": 1e-2}
        )
        files.append((made.to / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(("method", "train"), [("full", {"lr": 1e-3}), ("lora", {"lr": 1e-2})])
def test_loss_on_the_training_rows_falls_on_real_text(
    method: str, train: dict[str, Any], stories: Path, shared: Path, tmp_path: Path
) -> None:
    text = tmp_path / "play.txt"
    text.write_text((shared / "tinyshakespeare" / "input.txt").read_text()[:6000])
    result = modelwright.run(
        f"tune.{method}",
        base=stories,
        to=tmp_path / "out",
        data=str(text),
        evals={"seen": str(text)},
        train={"context": 64, "batch": 8, "epochs": 3, "eval_every": 1000, **train},
    )
    first, last = result.steps[0]["evals"]
    assert last["loss"] < first["loss"] - 0.3 and last["bits_per_byte"] < first["bits_per_byte"]
    assert Checkpoint(result.to).tokenizer().get_vocab() == Checkpoint(stories).tokenizer().get_vocab()


def test_finished_recipe_is_not_run_again(tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"base": tiny("llama"), "to": tmp_path / "out", "data": str(data), "train": {"context": 12}}
    modelwright.run("tune.full", **arguments)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(training, "fit", lambda *a, **k: pytest.fail("trained again"))
    modelwright.run("tune.full", **arguments)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="exists already"):
        modelwright.run("tune.full", **{**arguments, "seed": 5})


def test_holdout_and_named_evals_take_no_part_in_training(tiny: Any, data: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"base": tiny("llama"), "data": str(data), "train": {"context": 12, "batch": 4}}
    held = modelwright.run("tune.full", to=tmp_path / "a", holdout=0.25, **arguments).steps[0]
    named = modelwright.run("tune.full", to=tmp_path / "b", evals={"mine": str(data)}, **arguments).steps[0]
    none = modelwright.run("tune.full", to=tmp_path / "c", holdout=0, **arguments).steps[0]
    assert {e["name"] for e in held["evals"]} == {"held out"} and held["facts"]["steps"] == 3 and held["evals"][0]["tokens"] == 4 * 11
    assert {e["name"] for e in named["evals"]} == {"mine"} and named["facts"]["steps"] == 4
    assert none["evals"] == [] and none["facts"]["steps"] == 4


# ---- LoRA: the algebra -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tuned(
    tiny: Any, ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, dict[str, Tensor], Outcome, lora.Lora, Path]]:
    """A model with trained adapters, the base's weights, the outcome, the technique and the run's folder."""
    rows = Rows(ids.int(), ids.int(), torch.full((len(ids),), ids.shape[1]))

    def make(kind: str, changes: dict[str, Any] | None = None, **knobs: Any) -> tuple[Any, dict[str, Tensor], Outcome, lora.Lora, Path]:
        base = Checkpoint(tiny(kind, **(changes or {})))
        technique, folder, model = lora.Lora(lora.Knobs(**knobs)), tmp_path_factory.mktemp(kind), base.model()
        before = weights(model)
        out = fit(model, rows, Train(batch=8, lr=3e-2, warmup=0.0, epochs=2), techniques=[technique], evals={}, folder=folder, seed=0)
        return base, before, out, technique, folder

    return make


PLACES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {}, ["attn.q", "attn.v"]),
    ("llama", {}, ["attn.k", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]),
    ("qwen2", {}, ["attn.q", "attn.v"]),
    ("qwen3", {}, ["attn.q"]),
    ("gpt2", {}, ["attn.q", "attn.v"]),
    ("gpt2", {}, ["attn.o", "ffn.up", "ffn.down"]),
    ("phi3", {}, ["attn.q", "ffn.gate"]),
    ("gpt_neox", {}, ["attn.qkv"]),
    ("mixtral", {}, ["attn.q", "attn.v"]),
    ("mixtral", {}, ["expert.gate_up"]),
    ("mixtral", {}, ["expert.down", "attn.q"]),
    ("qwen3_moe", {}, ["expert.gate_up", "expert.down"]),
    ("llama", {"tie_word_embeddings": True}, ["attn.q"]),
    ("llama", {}, ["embed"]),
    ("llama", {}, ["head"]),
]


def named(place: tuple[str, dict[str, Any], list[str]]) -> str:
    return f"{place[0]}{' tied' if place[1] else ''}, {' '.join(place[2])}"


@pytest.mark.parametrize("place", PLACES, ids=named)
def test_adapters_start_as_the_base_and_merge_into_what_they_were(
    place: tuple[str, dict[str, Any], list[str]], tuned: Any, ids: Tensor, tmp_path: Path
) -> None:
    kind, changes, roles = place
    base, before, out, technique, folder = tuned(kind, changes, roles=roles)
    want = logits(base.model(), ids)
    fresh = base.model()
    assert torch.equal(logits(lora.Lora(lora.Knobs(roles=roles)).attach(fresh, Anatomy(fresh)), ids), want)  # step 0

    frozen = {n: p for n, p in out.model.named_parameters() if "lora_" not in n}
    assert all(not p.requires_grad for p in frozen.values()) and len(frozen) == len(before)
    for n, p in frozen.items():
        assert torch.equal(p, before[n.removeprefix("base_model.model.").replace(".base_layer", "")]), n

    adapted = logits(out.model, ids)
    assert apart(adapted, want) > 1e-2
    merged = technique.export(out.model, folder)
    assert type(merged) is type(base.model()) and apart(logits(merged, ids), adapted) <= 1e-4
    assert {n for n, p in weights(merged).items() if not torch.equal(p, before[n])} == expected(base.model(), roles)

    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base.model(), tmp_path / "adapter")
    assert apart(logits(loaded, ids), adapted) <= 1e-5


def expected(model: Any, roles: list[str]) -> set[str]:
    """The parameters that stand for these roles, fused or not."""
    fused = {"attn.q": "attn.qkv", "attn.v": "attn.qkv", "ffn.gate": "ffn.gate_up"}
    return {p.name for p in Anatomy(model) if p.kind == "weight" and any(r in (p.role,) or fused.get(r) == p.role for r in roles)}


def test_update_is_alpha_over_r_times_b_a(tuned: Any) -> None:
    _, before, out, technique, folder = tuned("llama", r=2, alpha=6.0, roles=["attn.q"])
    after = weights(technique.export(out.model, folder))
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    for i in (0, 1):
        path = f"model.layers.{i}.self_attn.q_proj"
        a, b = (adapter[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        assert a.shape == (2, 32) and b.shape == (32, 2) and b.abs().max() > 0
        assert torch.allclose(after[f"{path}.weight"], before[f"{path}.weight"] + 3.0 * b @ a, atol=1e-6)


def test_adapter_beside_a_result_gives_the_result(tiny: Any, data: Path, ids: Tensor, tmp_path: Path) -> None:
    base = tiny("llama")
    made = modelwright.run(
        "tune.lora",
        base=base,
        to=tmp_path / "out",
        data=str(data),
        train={"context": 12, "lr": 3e-2, "epochs": 3},
        roles=["attn.q", "ffn.down"],
    )
    model = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), step(made.to) / "adapter")
    merged = transformers.LlamaForCausalLM.from_pretrained(made.to)
    assert apart(logits(model, ids), logits(merged, ids)) <= 1e-4
    assert apart(logits(merged, ids), logits(transformers.LlamaForCausalLM.from_pretrained(base), ids)) > 1e-2


def test_adapter_on_a_tied_matrix_is_refused_or_merges_into_what_it_was(tuned: Any, ids: Tensor) -> None:
    try:
        _, _, out, technique, folder = tuned("llama", {"tie_word_embeddings": True}, roles=["embed"])
    except UserError:
        return
    adapted = logits(out.model, ids)
    assert apart(logits(technique.export(out.model, folder), ids), adapted) <= 1e-4


def test_tied_weights_stay_tied_in_the_result(tiny: Any, data: Path, tmp_path: Path) -> None:
    for method in ("full", "lora"):
        made = modelwright.run(
            f"tune.{method}",
            base=tiny("llama", tie_word_embeddings=True),
            to=tmp_path / method,
            data=str(data),
            train={"context": 12, "lr": 1e-2},
        )
        model = transformers.LlamaForCausalLM.from_pretrained(made.to)
        assert model.lm_head.weight is model.model.embed_tokens.weight and "lm_head.weight" not in load_file(made.to / "model.safetensors")


# ---- LoRA: what is refused -------------------------------------------------------------------------------------------
def attach(kind: str, **knobs: Any) -> Any:
    from families import model_of

    model = model_of(kind)
    return lora.Lora(lora.Knobs(**knobs)).attach(model, Anatomy(model))


@pytest.mark.parametrize(
    ("kind", "role", "hint"),
    [
        ("llama", "attn.g", "did you mean 'attn.[qkvo]'"),
        ("llama", "ffn.dwn", "did you mean 'ffn.down'"),
        ("llama", "attention", "did you mean|known: "),
        ("llama", "zzzz", "known: attn.k, attn.o"),
        ("mixtral", "expert.gate", "did you mean 'expert.gate_up'"),
        ("llama", "expert.gate_up", "did you mean|known: "),
        ("gpt2", "attn.qv", "did you mean 'attn.qkv'"),
    ],
)
def test_unknown_role_names_the_nearest_one(kind: str, role: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"'{role}'.*({hint})"):
        attach(kind, roles=["attn.o", role])


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("llama", {"roles": ["norm.attn"]}),
        ("llama", {"roles": []}),
        ("llama", {"roles": ["attn.q", "norm.final"]}),
        ("gpt2", {"roles": ["norm.ffn"]}),
    ],
    ids=str,
)
def test_roles_without_a_matrix_are_refused(kind: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        attach(kind, **knobs)


@pytest.mark.parametrize(
    "knobs",
    [{"roles": ["expert.gate_up"], "dropout": 0.1}, {"roles": ["router"]}, {"roles": ["router", "attn.q"], "dropout": 0.1}],
    ids=str,
)
def test_what_peft_cannot_adapt_is_a_user_error(knobs: dict[str, Any]) -> None:
    try:
        model = attach("mixtral", **knobs)
    except UserError:
        return
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n}
    assert all(
        any(part in n for n in adapted)
        for part in ({"router": "gate", "attn.q": "q_proj", "expert.gate_up": "experts"}[r] for r in knobs["roles"])
    )
    assert "dropout" not in knobs or any(isinstance(m, torch.nn.Dropout) and m.p == 0.1 for m in model.modules())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_failed_run_leaves_no_trace(method: str, tiny: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        modelwright.run(
            f"tune.{method}", base=tiny("llama"), to=tmp_path / "out", data={"path": str(data), "column": "inputids"}, train={"context": 12}
        )
    with pytest.raises(UserError):
        modelwright.run(f"tune.{method}", base=tiny("llama"), to=tmp_path / "out", data=str(data), train={"context": 65})
    assert list(tmp_path.iterdir()) == []
