"""tune.hft: which half is frozen, that it stays to the bit, and what the optimizer holds."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy, Block
from modelwright.core.model.classes import skeleton
from modelwright.core.train.freeze import Piece, halves, pieces_of, size_of, units
from modelwright.tune.hft import Hft, Knobs
from small import Fatal, go, moved, rows, same, weights

LAYERS = {"gpt2": "n_layer"}
LLAMA_7B = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
LLAMA_3_8B = transformers.LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
)


def anatomy(kind: str = "llama", layers: int = 2, **changes: Any) -> Anatomy:
    return Anatomy(model_of(kind, device="meta", **{LAYERS.get(kind, "num_hidden_layers"): layers}, **changes))


def drawn(block: Block, group: str, frozen: list[Piece]) -> set[str]:
    """Names of the matrices of a group that are frozen; a matrix is frozen whole, with its bias, or not at all."""
    chosen, found = set(frozen), set()
    for name, pieces in pieces_of(block, group).items():
        n = sum(p in chosen for p in pieces)
        assert n in (0, len(pieces)), (name, pieces)
        found |= {name} if n else set()
    return found


# ---- the draw --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_two_of_four_and_two_or_one_of_three_and_one_of_two_norms(kind: str, layers: int) -> None:
    of = anatomy(kind, layers)
    for seed in range(5):
        frozen = halves(of, seed)
        assert len(frozen) == len(set(frozen)) and all(of.parts[n].layer is not None for n, _ in frozen)
        counts = [{g: len(drawn(b, g, frozen)) for g in ("attn", "ffn", "norm")} for b in of.blocks]
        assert all(c["attn"] == 2 and c["norm"] == 1 for c in counts)
        assert Counter(c["ffn"] for c in counts) == Counter({2: layers // 2, 1: layers - layers // 2})


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("gpt2", {"attn": {2}, "ffn": {1}, "norm": {1}}),
        ("gpt_neox", {"attn": {2}, "ffn": {1}, "norm": {1}}),
        ("gemma2", {"attn": {2}, "ffn": {1, 2}, "norm": {2}}),
        ("qwen3", {"attn": {2}, "ffn": {1, 2}, "norm": {2}}),
        ("mixtral", {"attn": {2}, "expert": {1, 2}, "norm": {1}}),
        ("qwen2_moe", {"attn": {2}, "expert": {1, 2}, "shared": {1, 2}, "norm": {1}}),
    ],
)
def test_counts_in_other_families_where_router_and_embeddings_stay_free(kind: str, want: dict[str, set[int]]) -> None:
    of = anatomy(kind)
    frozen = halves(of, 3)
    assert all({len(drawn(b, g, frozen)) for b in of.blocks} == n for g, n in want.items())
    assert {of.parts[n].role.split(".")[0] for n, _ in frozen} == want.keys()


def test_same_seed_same_half_other_seed_or_round_another() -> None:
    def chosen(seed: int, turn: int, own: int | None = None) -> set[str]:
        technique, model = Hft(Knobs(round=own)), model_of("llama")
        technique.round = turn
        technique.select(model, Anatomy(model), seed)
        return set(technique.frozen)

    a = chosen(0, 0)
    assert a == chosen(0, 0) == chosen(0, 5, own=0) and a != chosen(1, 0) and a != chosen(0, 1) == chosen(0, 0, own=1)


@pytest.mark.parametrize("granularity", ["category", "layer", "model"])
def test_every_matrix_is_free_in_some_round_and_frozen_in_another(granularity: str) -> None:
    of = anatomy(layers=4)
    every = {p for b in of.blocks for g in ("attn", "ffn", "norm") for ps in pieces_of(b, g).values() for p in ps}
    draws = [set(halves(of, 1000 * turn, granularity)) for turn in range(40)]
    assert set.union(*draws) == every and not set.intersection(*draws)
    if granularity != "category":
        assert all(len(d) == len(every) // 2 for d in draws)
    if granularity == "layer":
        assert all(len({of.parts[n].layer for n, _ in d}) == 2 for d in draws)


def test_the_draw_is_even() -> None:
    of = anatomy()
    n = Counter(name for seed in range(600) for name in drawn(of.blocks[0], "attn", halves(of, seed)))
    assert n.keys() == set("qkvo") and all(240 < count < 360 for count in n.values())


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_balance_by_parameters_freezes_half_of_the_attention_where_heads_are_grouped(kind: str) -> None:
    of, shares = anatomy(kind, 2, num_key_value_heads=1), {}
    for balance in ("count", "params"):
        shares[balance] = set()
        for seed in range(20):
            b, size = of.blocks[0], {"q": 32 * 32, "o": 32 * 32, "k": 8 * 32, "v": 8 * 32}
            shares[balance].add(sum(size[n] for n in drawn(b, "attn", halves(of, seed, balance=balance))) / sum(size.values()))
    assert shares["params"] == {0.5} and shares["count"] == {0.2, 0.5, 0.8}


def fraction(config: Any, seed: int, matrices: bool = False, **knobs: Any) -> float:
    """Trainable share of the blocks, or of their matrices."""
    model = skeleton(config)
    of, technique = Anatomy(model), Hft(Knobs(**knobs))
    technique.select(model, of, seed)
    if not matrices:
        return technique.facts()["trainable share of the blocks"]
    parts = [p for p in of if p.layer is not None and len(p.shape) > 1]
    return sum(p.size for p in parts if p.name not in technique.frozen) / sum(p.size for p in parts)


def test_half_of_llama_2_7b_is_trainable_exactly_and_of_llama_3_8b_on_average() -> None:
    assert {fraction(LLAMA_7B, s, matrices=m) for s in range(2) for m in (True, False)} == {0.5}
    of = Anatomy(skeleton(LLAMA_3_8B))
    shares = [1 - size_of(of, halves(of, s)) / sum(p.size for p in of if p.layer is not None) for s in range(60)]
    assert 0.493 <= sum(shares) / 60 <= 0.502 and all(0.47 < s < 0.53 for s in shares)
    assert fraction(LLAMA_3_8B, 0) == pytest.approx(shares[0])
    assert {fraction(LLAMA_3_8B, s, matrices=True, balance="params") for s in range(2)} == {0.5}


# ---- what moves ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "opt", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen2_moe"])
def test_frozen_pieces_stay_to_the_bit_under_momentum_and_weight_decay(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tie_word_embeddings=True) if kind == "llama" else model_of(kind)
    before, of, technique = weights(model), Anatomy(model), Hft(Knobs())
    frozen = set(halves(of, 0))
    technique.round = 0
    out = go(technique, model, tmp_path, rows(16), epochs=3, weight_decay=0.1, lr=3e-2)
    for part in of:
        old, new = before[part.name], out.model.get_parameter(part.name)
        for piece in part.rows or [""]:
            which = units(part, [piece]) if piece else slice(None)
            a, b = (x.mT if part.orientation == "in_out" else x.flatten(0, 1) if x.dim() == 3 else x for x in (old, new))
            still = torch.equal(a[which], b[which])
            silent = part.kind == "bias" and (part.role == "attn.k" or piece == "k")  # softmax cancels a key bias
            assert still == ((part.name, piece) in frozen or (part.name, "") in frozen) or silent, (part.name, piece)
    assert "0 of them moved" in out.liveness[0]


def test_tied_embeddings_final_norm_and_head_always_move(tmp_path: Path) -> None:
    for tied in (False, True):
        model = model_of("llama", tie_word_embeddings=tied)
        before = weights(model)
        out = go(Hft(Knobs()), model, tmp_path / str(tied))
        assert {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"}) <= moved(out.model, before)
        assert not tied or out.model.lm_head.weight is out.model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_optimizer_holds_state_for_the_chosen_half_alone(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    go(Hft(Knobs()), model, tmp_path, save_every=1, epochs=1)
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    size = sum(s[k].numel() * s[k].element_size() for s in saved.values() for k in ("exp_avg", "exp_avg_sq"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size == 2 * 4 * trainable and trainable < 0.75 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_resumed_run_is_equal_to_the_bit(kind: str, tmp_path: Path) -> None:
    def run(folder: str, stop: int | None = None) -> Any:
        return go(Hft(Knobs()), model_of(kind), tmp_path / folder, rows(12), stop, batch=2, accumulate=2, epochs=3, save_every=3)

    want = weights(run("a").model)
    with pytest.raises(Fatal):
        run("b", stop=5)
    assert same(weights(run("b").model), want)


class Loose(Hft):
    """The rows of fused tensors are not put back."""

    def after_step(self, named: Any) -> None:
        pass


class Blind(Hft):
    """Gradients of frozen rows stay, and the rows too."""

    def on_gradients(self, named: Any) -> None:
        pass


@pytest.mark.parametrize(("broken", "train"), [(Loose, {"weight_decay": 0.5}), (Blind, {})])
def test_sabotage_is_found_after_the_first_step(broken: type[Hft], train: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hft: \d+ frozen tensors moved"):
        go(broken(Knobs()), model_of("gpt2"), tmp_path, **train)
