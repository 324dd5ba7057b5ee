"""Map-tuning: plug a knowledge base into models that are finished (Plug-and-Play Knowledge Injection, arXiv 2305.17691).

When to use it: entities have vectors (TransE, a sentence encoder) and a model should know more about them without being trained again.
One affine map f(e) = W e + b leads from the vectors into the space of the input embeddings, and f(e) is spliced before each mention:

    [f(e)] / mention

General map-tuning (`trains: map, learn: mentions`) freezes the model. In BERT-like models the mention's pieces are hidden and must be
found again from f(e) and the rest: one row for each mention and one with all of them hidden. The model's dropout is ON while the map is
learnt: it stands for the changes that later tuning makes, so that one map serves every model tuned from this one.
Task-specific map-tuning: `learn: text` on the task's own texts. Tuning with a map: `trains: model` with `map:` of an earlier run.
Sentences without an entity that has a vector, or longer than the context, are left out and counted.

The result is the unchanged model; the map lies in it as steps/*/adapter/entity_map.safetensors. `deploy: true` writes mapped entities as
extra embedding rows too, with a token <entity:ID> each: any stock loader then reads "<entity:Q42> / Douglas Adams".

`inspect.map_tuning` recomputes the published tables from the official result files.

Official code (thunlp/Knowledge-Plugin): pseudo-words in the tokenizer, one tensor a token, BERT alone; its "frozen" map is so only because
the optimizer leaves it out. Ours: ids from the tokenizer's length up stand for entities, two hooks on the embedding; decoders, where the
mention is learnt by next tokens after its vector, and where there is no dropout but that of attention, the embeddings get it too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.core.data.rows import IGNORE, Rows, collate
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.objective import MaskedTokens, NextToken, Objective, objective_class
from modelwright.core.train.technique import Technique
from modelwright.tune.entities.mentions import mention_rows, read_sentences
from modelwright.tune.entities.plug import NAME, EntityMap, Plug, add_rows
from modelwright.tune.entities.vectors import read_vectors


@dataclass(frozen=True, kw_only=True)
class Knobs(Tune):
    vectors: str = knob(help="npz, parquet, json or jsonl file with an id and a vector for each entity", path=True)
    map: str | None = knob(None, "map of an earlier run to begin with: its file or folder", path=True)
    trains: Literal["map", "model"] = knob("map", "what moves: the map, or the model under a map that stays")
    learn: Literal["mentions", "text"] = knob("mentions", "targets: the pieces of the mentions, or all of the text")
    dropout: float = knob(0.25, "dropout of the model while a map is learnt", low=0, high=0.9)
    missing: Literal["skip", "zero"] = knob("skip", "an entity without a vector: nothing is spliced, or f(0) = b")
    deploy: bool = knob(False, "write the mapped entities as embedding rows and tokens of the result")


class HiddenMentions(Objective):
    """A masked model finds the pieces of the mentions again; the rows say which are hidden."""

    kind, name = "masked", "hidden mentions"

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        batch["labels"] = torch.cat([torch.full_like(batch["labels"][:, :1], IGNORE), batch["labels"]], 1)
        return batch

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}


class HiddenWords(MaskedTokens):
    """BERT's objective; vectors of entities are never hidden."""

    def __init__(self, model: Any, tokenizer: Any, seed: int, mask_share: float, entities: range):
        super().__init__(model, tokenizer, seed, mask_share)
        self._special = torch.cat([self._special, torch.tensor(entities)])


class MapTuning(Technique):
    """The map as an attachment; rows with vectors before the mentions."""

    name = "map_tuning"
    supports = Technique.supports - {"lora"}

    def __init__(self, knobs: Knobs):
        self.knobs, self.vectors = knobs, read_vectors(knobs.vectors)
        self.plug: Plug | None = None
        self._dropouts: list[tuple[Any, str, float]] = []
        if knobs.trains == "model" and not knobs.map:
            raise UserError("trains is model and there is no map", "the map stays as it is", "give map: of an earlier run")

    # ---- data and objective ----------------------------------------------------------------------------------------------
    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> Objective | None:
        kind = objective_class(model)
        if kind not in (MaskedTokens, NextToken):
            raise UserError(f"map-tuning does not fit {type(model).__name__}", "it is for masked models and decoders", "give one of them")
        if tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "mentions are text", "add tokenizer files")
        self._masked, self._offset = kind is MaskedTokens, len(tokenizer)
        self._tokenizer = tokenizer
        if not self._masked:
            return None
        if self.knobs.learn == "text":
            return HiddenWords(model, tokenizer, seed, train.mask_share, range(self._offset, self._offset + len(self.vectors) + 1))
        return HiddenMentions(model, tokenizer, seed)

    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> Rows:
        sentences = read_sentences(data)
        places = {name: self._offset + i for name, i in self.vectors.places.items()}
        if self.knobs.missing == "zero":
            unknown = {e for s in sentences for *_, e in s.mentions} - places.keys()
            places |= dict.fromkeys(unknown, self._offset + len(self.vectors))
        return mention_rows(sentences, tokenizer, places, train.context, masked=self._masked, learn=self.knobs.learn)

    # ---- the map -----------------------------------------------------------------------------------------------------------
    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        entity_map = EntityMap(self.vectors, model.get_input_embeddings().weight.shape[1], self._offset)
        if self.knobs.map:
            entity_map.load(self.knobs.map)
        self.plug = Plug(model, entity_map)
        if self.knobs.trains == "map":
            self._dropouts = set_dropout(model, self.knobs.dropout)
        return model

    def select(self, model: Any, anatomy: Anatomy, seed: int) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and f".{NAME}." in f".{name}" if self.knobs.trains == "map" else f".{NAME}." not in f".{name}")

    def liveness(self, moved: dict[str, Tensor]) -> str:
        changed = {n for n, m in moved.items() if bool(m.any())}
        map_moved, model_moved = ({n for n in changed if (NAME in n) == ours} for ours in (True, False))
        wrong = model_moved if self.knobs.trains == "map" else map_moved
        if wrong or not changed:
            raise RuntimeError(f"map_tuning: {f'{min(wrong)} moved and should not' if wrong else 'nothing moved'} in the first step")
        return f"map_tuning: {len(changed)} tensors moved, all of the {self.knobs.trains}"

    def facts(self) -> dict[str, Any]:
        n = 0 if self.plug is None else sum(p.numel() for p in self.plug.map.parameters())
        return {"entities with a vector": len(self.vectors), "parameters of the map": n}

    def export(self, model: Any, folder: Path) -> Any:
        assert self.plug is not None
        self.plug.remove()
        for module, name, value in self._dropouts:
            setattr(module, name, value)
        self.plug.map.save(folder / "adapter")
        if self.knobs.deploy:
            names = sorted(self.vectors.places, key=lambda n: self.vectors.places[n])
            add_rows(model, self.plug.map, len(self.vectors), self._tokenizer, names)
            self.tokenizer = self._tokenizer
        return model


def set_dropout(model: Any, share: float) -> list[tuple[Any, str, float]]:
    """Set every dropout of a model, of hidden states and of attention. Returns what it was: (module, attribute, share)."""
    found: list[tuple[Any, str, float]] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            found.append((module, "p", module.p))
        for name in ("dropout", "attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                found.append((module, name, getattr(module, name)))
    if not any(name == "p" for _, name, _ in found):  # a decoder of today: what it reads is dropped instead
        noise = _Noise()
        noise.register(model.get_input_embeddings())
        found.append((noise, "share", 0.0))
    for module, name, _ in found:
        setattr(module, name, share)
    return found


class _Noise:
    """Dropout on the output of the input embedding, while it trains; none at share 0."""

    share = 0.0

    def register(self, embedding: nn.Module) -> None:
        embedding.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return nn.functional.dropout(out, self.share, module.training) if self.share else out


METHOD = MapTuning
