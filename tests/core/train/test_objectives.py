"""Every objective under the one loop: an encoder-decoder learns pairs, an encoder masked tokens, under several methods."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

import modelwright
from families import model_of
from modelwright.core.data.make import Encoder
from modelwright.core.data.read import Pair
from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.loop import Outcome, fit
from modelwright.core.train.objective import MaskedTokens, PairsOfTexts, RankedPairs, objective_class
from modelwright.core.train.technique import Technique
from small import Fatal, far, same, weights

SENTENCES = [f"the {a} {b} {c} the {d}" for a in ("old", "red") for b in ("ship", "dog") for c in ("saw", "left") for d in ("pier", "sea")]
PLAIN = {"certificate": "structure"}


# ---- models with tokenizers that belong to them --------------------------------------------------------------------------
def _trained(model: Any, trainer: Any, pre: Any, around: str | None, **special: str) -> Any:
    words = Tokenizer(model)
    words.pre_tokenizer = pre
    if trainer is not None:
        words.train_from_iterator(SENTENCES, trainer)
    if around:
        names = [special["cls_token"], special["sep_token"]] if "cls_token" in special else [special["eos_token"]]
        words.post_processor = processors.TemplateProcessing(single=around, special_tokens=[(n, words.token_to_id(n)) for n in names])
    if isinstance(pre, pre_tokenizers.ByteLevel):
        words.decoder = decoders.ByteLevel()
    return T.PreTrainedTokenizerFast(tokenizer_object=words, **special)


@cache
def tokenizer_of(kind: str) -> Any:
    """WordPiece for BERT, BPE over bytes for RoBERTa, Unigram of whole words for T5."""
    if kind == "bert":
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=list(special.values()))
        return _trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.Whitespace(), "[CLS] $A [SEP]", **special)
    if kind == "roberta":
        special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
        trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=list(special.values()))
        pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return _trained(models.BPE(), trainer, pre, "<s> $A </s>", **special, bos_token="<s>", eos_token="</s>")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = [*special.values(), *sorted({"▁" + word for s in SENTENCES for word in s.split()})]
    unigram = models.Unigram([(word, -float(i > 2)) for i, word in enumerate(vocabulary)], unk_id=2)
    return _trained(unigram, None, pre_tokenizers.Metaspace(), "$A </s>", **special)


def built(kind: str, dtype: str = "float32", **changes: Any) -> Any:
    if kind == "t5":
        return model_of("t5", dtype=dtype, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **changes)
    if kind == "bert":
        return model_of("bert", dtype=dtype, pad_token_id=tokenizer_of("bert").pad_token_id, **changes)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 66}
    return T.RobertaForMaskedLM(T.RobertaConfig(vocab_size=96, type_vocab_size=1, pad_token_id=1, **size, **changes)).to(
        getattr(torch, dtype)
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """base("t5", "bfloat16") -> folder of a tiny model with its tokenizer."""

    @cache
    def make(kind: str, dtype: str = "float32") -> Path:
        folder = tmp_path_factory.mktemp(kind)
        built(kind, dtype).save_pretrained(folder)
        tokenizer_of(kind).save_pretrained(folder)
        return folder

    return make


def data_of(kind: str, folder: Path) -> dict[str, Any]:
    if kind != "t5":
        file = folder / "text.txt"
        file.write_text("\n".join(SENTENCES * 2))
    else:
        file = folder / "pairs.jsonl"
        file.write_text("".join(json.dumps({"prompt": s, "completion": " ".join(s.split()[1:3])}) + "\n" for s in SENTENCES))
    return {"path": str(file)}


def tuned(method: str, kind: str, folder: Path, base: Path, knobs: dict[str, Any] | None = None, **train: Any) -> Any:
    settings = {"batch": 8, "context": 24, "lr": 1e-2, "warmup": 0.0, "eval_every": 1000, "schedule": "constant", "record": False, **train}
    data = data_of(kind, folder)
    return modelwright.run(
        method, base=base, to=folder / "made", data=data, evals={"same": data}, train=settings, save=PLAIN, **(knobs or {})
    )


# ---- whole runs ------------------------------------------------------------------------------------------------------------
LOADERS = {"t5": T.AutoModelForSeq2SeqLM, "bert": T.AutoModelForMaskedLM, "roberta": T.AutoModelForMaskedLM}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["t5", "bert", "roberta"])
def test_full_tuning_learns_saves_and_loads(kind: str, dtype: str, base: Any, tmp_path: Path) -> None:
    source = base(kind, dtype)
    result = tuned("tune.full", kind, tmp_path, source, epochs=4)
    first, last = (e["loss"] for e in (result.steps[0]["evals"][0], result.steps[0]["evals"][-1]))
    assert last < first - 0.3
    model = LOADERS[kind].from_pretrained(tmp_path / "made")
    assert type(model) is type(built(kind)) and {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    old = Checkpoint(source)
    made = Checkpoint(tmp_path / "made")
    still = [n for n in old.table if "position" not in n and "token_type" not in n and torch.equal(old.get(n), made.get(n))]
    assert not still


@pytest.mark.slow
def test_a_tuned_encoder_decoder_gives_the_answers_it_was_taught(base: Any, tmp_path: Path) -> None:
    tuned("tune.full", "t5", tmp_path, base("t5"), epochs=40, schedule="linear")
    model, words = T.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "made").eval(), tokenizer_of("t5")
    right = 0
    for s in SENTENCES:
        out = model.generate(**{k: v for k, v in words(s, return_tensors="pt").items() if k != "token_type_ids"}, max_new_tokens=12)
        right += words.decode(out[0], skip_special_tokens=True).replace("▁", " ").split() == s.split()[1:3]
    assert right > len(SENTENCES) / 2, "one answer for all would be right in a quarter"


def test_both_texts_of_a_pair_are_tokenised_for_themselves() -> None:
    words = tokenizer_of("t5")
    [pair] = Encoder(words, "pairs").documents([(1, Pair("the old pier", "red ship"))], refuse=pytest.fail)
    assert pair.learnt is not None
    given, learnt = pair.ids[~pair.learnt].tolist(), pair.ids[pair.learnt].tolist()
    assert given == words("the old pier", add_special_tokens=False)["input_ids"]
    assert learnt == words("red ship")["input_ids"], "as the tokenizer gives the answer, with the end token"


# ---- what each model learns from -------------------------------------------------------------------------------------------
def test_the_objective_follows_from_the_class() -> None:
    assert objective_class(built("t5")) is PairsOfTexts
    assert objective_class(built("bert")) is objective_class(built("roberta")) is MaskedTokens
    config = model_of("llama").config
    config.num_labels = 1
    assert objective_class(T.LlamaForSequenceClassification(config)) is RankedPairs


# ---- masks -----------------------------------------------------------------------------------------------------------------
def row(example: int, n: int = 12) -> dict[str, Any]:
    ids = (torch.arange(n) * 7 + example) % 80 + 5
    return {"input_ids": ids, "labels": ids, "length": torch.tensor(n), "example_id": example}


def masked(examples: list[dict[str, Any]], step: int = 0, seed: int = 0) -> dict[str, Tensor]:
    objective = MaskedTokens(built("bert"), tokenizer_of("bert"), seed)
    batch = objective.collate(examples)
    objective.prepare(batch, step)
    return batch


def test_masks_depend_on_seed_step_and_example_alone() -> None:
    together = masked([row(k) for k in range(6)], step=3)
    alone = masked([row(4)], step=3)
    assert torch.equal(together["input_ids"][4], alone["input_ids"][0]) and torch.equal(together["labels"][4], alone["labels"][0])
    many = [row(k, 40) for k in range(8)]
    first = masked(many)["input_ids"]
    assert torch.equal(first, masked(many)["input_ids"])
    assert not torch.equal(first, masked(many, step=1)["input_ids"]) and not torch.equal(first, masked(many, seed=1)["input_ids"])
    assert (
        len({tuple(r.tolist()) for r in masked([row(k, 40) | {"input_ids": row(0, 40)["input_ids"]} for k in range(8)])["input_ids"]}) == 8
    )


def test_masks_do_not_depend_on_how_long_the_others_are() -> None:
    alone, beside = masked([row(4, 50)], step=3), masked([row(4, 50), row(5, 60)], step=3)
    assert torch.equal(alone["labels"][0], beside["labels"][0, :53])
    assert torch.equal(alone["input_ids"][0], beside["input_ids"][0, :52])


def test_a_share_is_to_be_found_and_specials_never_are() -> None:
    batch = masked([row(k, 50) for k in range(60)])
    chosen, words = batch["labels"][:, 1:] != IGNORE, tokenizer_of("bert")
    assert 0.12 < float(chosen.float().mean()) < 0.18
    assert not bool(chosen[:, 0].any() or chosen[:, -1].any())
    hidden, whole = batch["input_ids"][chosen], batch["whole"][chosen]
    assert 0.74 < float((hidden == words.mask_token_id).float().mean()) < 0.86
    assert 0.05 < float((hidden == whole).float().mean()) < 0.16
    assert torch.equal(batch["input_ids"][~chosen], batch["whole"][~chosen]), "what is not to be found is left as it is"


# ---- one batch, several, recomputed, resumed ---------------------------------------------------------------------------------
def token_rows(kind: str, n: int = 24, width: int = 14) -> Rows:
    """Ragged rows; of pairs the first third is given."""
    g = torch.Generator().manual_seed(2)
    ids, lengths = torch.randint(6, 90, (n, width), generator=g, dtype=torch.int32), torch.randint(6, width + 1, (n,), generator=g)
    at = torch.arange(width)
    learnt = (at < lengths[:, None]) & ((at >= 4) | torch.tensor(kind != "t5"))
    return Rows(torch.where(at < lengths[:, None], ids, 0), torch.where(learnt, ids, IGNORE), lengths)


@dataclass
class Stop:
    at: int | None = None

    def __call__(self, step: int, of: int) -> None:
        if step == self.at:
            raise Fatal


def go(kind: str, folder: Path, stop: int | None = None, *, dtype: str = "float32", dropout: float = 0.0, **train: Any) -> Outcome:
    rates = {"dropout_rate": dropout} if kind == "t5" else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = built(kind, dtype, **rates)
    knobs = Train(**{"batch": 4, "lr": 1e-3, "schedule": "constant", "warmup": 0.0, "record": False, **train})
    objective = objective_class(model)(model, tokenizer_of(kind), 0)
    return fit(
        model, token_rows(kind), knobs, techniques=[Technique()], evals={}, folder=folder, seed=0, tick=Stop(stop), objective=objective
    )


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_accumulated_and_recomputed_steps_are_those_of_one_batch(kind: str, tmp_path: Path) -> None:
    # sgd: Adam's first steps are the sign of the gradient, and would blow rounding up
    knobs: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1}
    want = weights(go(kind, tmp_path / "a", batch=8, **knobs).model)
    assert far(weights(go(kind, tmp_path / "b", batch=4, accumulate=2, **knobs).model), want) < 1e-5
    assert far(weights(go(kind, tmp_path / "c", batch=8, gradient_checkpointing=True, **knobs).model), want) < 1e-5
    assert far(want, weights(built(kind))) > 1e-3, "the steps are long enough for a difference to show"


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"save_every": 2, "dropout": 0.1, "dtype": "bfloat16"}
    want = weights(go(kind, tmp_path / "a", **knobs).model)
    with pytest.raises(Fatal):
        go(kind, tmp_path / "b", 5, **knobs)
    assert same(weights(go(kind, tmp_path / "b", **knobs).model), want)


# ---- the methods under each objective -----------------------------------------------------------------------------------------
def moved_units(source: Path, made: Path) -> dict[str, float]:
    """Share of each matrix's output units that are not what they were."""
    old, new = Checkpoint(source), Checkpoint(made)
    return {
        n: float((old.get(n) != new.get(n)).flatten(1).any(1).float().mean())
        for n in old.table
        if len(old.shape(n)) == 2 and old.dtype(n).is_floating_point
    }


def by_role(source: Path, shares: dict[str, float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for part in Anatomy(Checkpoint(source).skeleton):
        if part.name in shares:
            found.setdefault(part.role, []).append(shares[part.name])
    return found


METHODS: dict[str, dict[str, Any]] = {
    "tune.migu": {"threshold": 0.75, "mask_first": True},
    "tune.hft": {},
    "tune.key_value": {"part": "keys"},
    "tune.lora": {"r": 2},
}


UNDER = [pytest.param(m, k, id=f"{m}-{k}") for m in METHODS for k in ("t5", "bert")]


@pytest.mark.parametrize(("method", "kind"), UNDER)
def test_methods_move_what_they_say_and_nothing_else(method: str, kind: str, base: Any, tmp_path: Path) -> None:
    source = base(kind)
    # one step: masked units have no gradient yet that Adam could remember
    result = tuned(method, kind, tmp_path, source, METHODS[method], batch=64, epochs=1)
    assert result.steps[0]["facts"]["steps"] == 1
    said, shares = result.steps[0]["liveness"][0], moved_units(source, tmp_path / "made")
    roles = by_role(source, shares)
    layers = {r: v for r, v in roles.items() if r.startswith(("attn.", "cross.", "ffn."))}
    assert said.startswith(method.removeprefix("tune.").split("_")[0]) and any(shares.values())
    if method == "tune.migu":
        assert all(0 < s <= 0.26 for r in layers for s in layers[r] if "bias" not in r), layers
        assert " 0 of them moved" in said
    if method == "tune.hft":
        flat = [s for v in layers.values() for s in v]
        assert flat.count(0.0) * 2 == len(flat)
    if method == "tune.key_value":
        assert {r for r, v in roles.items() if any(v)} == {"ffn.up"} and all(s > 0 for s in roles["ffn.up"])
    if method == "tune.lora":
        assert all(s == 0 for r, v in roles.items() if r not in layers for s in v) and any(s > 0 for v in layers.values() for s in v)


def test_the_positions_that_roberta_keeps_for_padding_do_not_count(base: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="context=66 is longer than the model's 64 positions"):
        tuned("tune.full", "roberta", tmp_path, base("roberta"), context=66)
    assert not (tmp_path / "made").exists()
