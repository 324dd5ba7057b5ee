"""ERNIE-Code: one encoder-decoder for many languages and programming languages (arXiv 2212.06742).

When to use it: a T5 or mT5 should learn languages and code from monolingual texts and from pairs with English alone; pairs of two other
languages are not needed. Two losses are mixed, row by row:

    SCLM  span corruption of monolingual texts: T5's counts, 15 % of the tokens in spans of 3 on average (tune/spans/corrupt.py)
    PTLM  translation through the pivot, both directions of each pair. `form: prefix` gives "translate English to German: \\n" and the
          source, and learns the target; `form: concatenated` corrupts spans of source and target together

`mono` names texts by language, `pairs` tables by two languages ("en-de", one of which is the pivot). Within each of the two groups a
language gets p_i = q_i^alpha / sum q_j^alpha of the tokens, q its share of the group's, or UniMax's share (equal, at most `passes` times
its size). Sizes are tokens; of a pair the side that is not the pivot counts, so that English is not counted in every pair.
With mono alone this is SCLM, with pairs alone PTLM. Spans are drawn anew in each step, by seed, step and example. Small languages are
repeated, so a share that is held out may hold rows that are trained on too: give `evals` (pairs of prompt and completion).

White space of code: line end, tabulator and <|space|> x 1, 2, 4 become tokens (new ones get the mean embedding), indentation is written
with them, and decoding takes back the one space that SentencePiece puts after each (tune/spans/whitespace.py). `spaces: all` is ours.
`tasks` are pairs (prompt, completion) that the result generates and that sacrebleu scores; the paper's beam 3, length penalty 0.

No training code is published. Which of the two forms the paper trains cannot be read, so both are here; alpha 0.3 is XLM's value, the
share of pairs (half of the tokens) and mixing rows instead of whole batches are ours. Padding rows of mT5's vocabulary stay in the softmax.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modelwright.core.data.read import Pair, read
from modelwright.core.data.rows import IGNORE, Rows, TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.train.objective import PairsOfTexts
from modelwright.core.train.technique import Technique
from modelwright.tune.spans.corpora import chunks, pair_rows, read_pairs, together
from modelwright.tune.spans.corrupt import corrupt, raw_length, sentinels_of
from modelwright.tune.spans.mixing import shares
from modelwright.tune.spans.tasks import generate, require_sacrebleu, score
from modelwright.tune.spans.whitespace import add_tokens


@dataclass(frozen=True)
class Knobs(Tune):
    mono: dict[str, Data] = knob({}, "texts by language or programming language")
    pairs: dict[str, Data] = knob({}, "pairs by two languages, such as en-de: columns en and de, or files with {lang} in the path")
    pivot: str = knob("en", "the language that every pair has")
    form: Literal["prefix", "concatenated"] = knob("prefix", "pairs: source and target, or both as one text with hidden spans")
    parallel: float = knob(0.5, "share of the tokens that are pairs, where there are texts too", low=0, high=1)
    mixing: Literal["exponent", "unimax"] = knob("exponent", "how languages share a group")
    alpha: float = knob(0.3, "exponent: power of a language's size; 1: as they are, 0: equal", low=0, high=1)
    passes: float = knob(4.0, "unimax: passes over a language, at most", low=0.01)
    density: float = knob(0.15, "share of the tokens that are hidden", low=0.01, high=0.9)
    mean: float = knob(3.0, "mean length of a hidden span in tokens", low=1)
    spaces: Literal["indent", "all", "none"] = knob("indent", "spaces that become tokens: after line ends, all that would be lost, none")
    names: dict[str, str] = knob({}, "the word for a language in prompts, such as de: German")
    tasks: dict[str, Data] = knob({}, "pairs to be generated and scored at the end, by name")
    beams: int = knob(3, "tasks: beams of the search", low=1)


class Mixture(PairsOfTexts):
    """Rows with a target are pairs; of the others spans are hidden, anew in each step."""

    name = "span corruption and pairs"

    def __init__(self, model: Any, tokenizer: Any, seed: int, sentinels: list[int], density: float, mean: float):
        super().__init__(model, tokenizer, seed)
        self.sentinels, self.density, self.mean = sentinels, density, mean

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [int(r["length"]) for r in rows]
        batch = {
            "whole": _filled([r["input_ids"][:n] for r, n in zip(rows, lengths, strict=True)], 0),
            "learnt": _filled([r["labels"][:n] != IGNORE for r, n in zip(rows, lengths, strict=True)], 0),
            "lengths": torch.tensor(lengths),
            "example_id": torch.tensor([r["example_id"] for r in rows]),
        }
        self.prepare(batch, 0)
        return batch

    def prepare(self, batch: dict[str, Tensor], step: int) -> None:
        rows = []
        for ids, learnt, n, example in zip(*(batch[k].tolist() for k in ("whole", "learnt", "lengths", "example_id")), strict=True):
            given, target = ids[:n], []
            if any(learnt[:n]):
                at = learnt.index(1)
                given, target = ids[:at], ids[at:n]
            elif n:
                rng = np.random.default_rng((self.seed, step, example + 1))
                given, target = corrupt(given, self.sentinels, rng, self.density, self.mean)
                target = [*target, self._end] if target else []
            both = torch.tensor([*given, *target], dtype=torch.long)
            labels = torch.where(torch.arange(len(both)) >= len(given), both, IGNORE)
            rows.append({"input_ids": both, "labels": labels, "length": len(both), "example_id": example})
        where = batch["whole"].device
        batch |= {k: v.to(where) for k, v in super().collate(rows).items()}


def _filled(values: list[Tensor], fill: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([v.long() for v in values], batch_first=True, padding_value=fill)


class ErnieCode(Technique):
    """The data policy, the objective, new tokens, and the tasks at the end."""

    name = "ernie_code"

    def __init__(self, knobs: Knobs):
        self.knobs, self._new = knobs, 0
        self._facts: dict[str, Any] = {}
        self._tasks: dict[str, list[Pair]] = {}
        if not knobs.mono and not knobs.pairs:
            raise UserError("ernie_code has nothing to learn from", "mono and pairs are empty", "give texts, pairs or both by language")
        if knobs.data.path or knobs.data.sources:
            raise UserError("data is given", "ernie_code reads mono and pairs, by language", "move it to one of them")
        for key in knobs.pairs:
            a, _, b = key.partition("-")
            if not a or not b or a == b:
                raise UserError(f"pairs has '{key}'", "a key names two languages, such as en-de", "rename it")
            if knobs.pivot not in (a, b):
                raise UserError(f"pairs has '{key}'", f"every pair goes through the pivot {knobs.pivot}", "change pivot, or leave it out")
        if knobs.tasks:
            require_sacrebleu()

    # ---- objective and data ----------------------------------------------------------------------------------------------
    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> Mixture:
        if not model.config.is_encoder_decoder:
            raise UserError(f"ernie_code does not fit {type(model).__name__}", "it is for encoder-decoders", "give a T5 or mT5")
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise UserError("the checkpoint has no tokenizer with an end token", "targets end with it", "add tokenizer files")
        self._sentinels = sentinels_of(tokenizer)
        if self.knobs.spaces != "none":
            self._new = max(self._new, add_tokens(tokenizer))
            self.tokenizer = tokenizer
        self._words, self._context = tokenizer, train.context
        return Mixture(model, tokenizer, seed, self._sentinels, self.knobs.density, self.knobs.mean)

    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> TokenRows | None:
        k = self.knobs
        if any(data is held_out for held_out in k.evals.values()):
            return None
        vocab = max(vocab, len(tokenizer))
        length, _ = raw_length(train.context, k.density, k.mean, len(self._sentinels) - 1)
        texts = {name: chunks(d, tokenizer, vocab, length, k.spaces) for name, d in k.mono.items()}
        pairs: dict[str, Rows] = {}
        for key, d in k.pairs.items():
            a, _, b = key.partition("-")
            how: dict[str, Any] = {"names": k.names, "form": k.form, "spaces": k.spaces}
            pairs[key] = pair_rows(read_pairs(d, a, b), (a, b), tokenizer, vocab, train.context, **how)
        sizes = {name: rows.tokens for name, rows in texts.items()}
        others = {key: int(rows.facts[f"tokens of {_other(key, k.pivot)}"]) for key, rows in pairs.items()}
        parallel = 0.0 if not pairs else k.parallel if texts else 1.0
        every: dict[str, float] = {}
        for group, of, whole in (("text", sizes, 1 - parallel), ("pairs", others, parallel)):
            if of:
                budget = train.tokens * whole if train.tokens else train.epochs * sum(of.values())
                every |= {f"{group} {n}": whole * p for n, p in shares(of, k.mixing, k.alpha, budget, k.passes).items()}
        parts = {f"text {n}": r for n, r in texts.items()} | {f"pairs {n}": r for n, r in pairs.items()}
        made, passes = together(parts, every, seed)
        self._facts |= {"shares of tokens": every, "passes in an epoch": passes}
        return made

    def attach(self, model: Any, anatomy: Anatomy) -> Any:
        """Rows for new tokens, the mean of those before."""
        self._model = model
        if not self._new:
            return model
        words = len(self._words)
        if words > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(words, mean_resizing=False)
        with torch.no_grad():
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                layer.weight[words - self._new : words] = layer.weight[: words - self._new].float().mean(0).to(layer.weight.dtype)
        return model

    # ---- tasks -------------------------------------------------------------------------------------------------------------
    def prepare(self, rows: TokenRows) -> TokenRows:
        self._tasks = {name: [p for p in read(d) if isinstance(p, Pair)] for name, d in self.knobs.tasks.items()}
        for name, pairs in self._tasks.items():
            if not pairs:
                raise UserError(f"tasks has {name} without pairs", "a task is a table of prompt and completion", "name its columns so")
        return rows

    def facts(self) -> dict[str, Any]:
        """Shares and passes of the languages, and the scores of the tasks, which are generated now that the run is over."""
        for name, pairs in self._tasks.items():
            how: dict[str, Any] = {"spaces": self.knobs.spaces, "beams": self.knobs.beams, "most": self._context}
            said = generate(self._model, self._words, [p.prompt for p in pairs], **how)
            self._facts[name] = score(said, [p.completion for p in pairs]) | {"pairs": len(pairs)}
        return self._facts


def _other(key: str, pivot: str) -> str:
    a, _, b = key.partition("-")
    return b if a == pivot else a


METHOD = ErnieCode
