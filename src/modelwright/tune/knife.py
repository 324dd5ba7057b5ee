"""KNIFE: distil rationales into a small model that answers without reading or writing them (arXiv 2212.09721).

When to use it: the training questions have a choice of answers and a free-text rationale each, new questions have none. Two steps:

1. `way: teacher`. The model reads question and rationale, [x; r], but the answer may read the states of x alone (a bottleneck in the
   cross-attention), so that what the rationale says must be put into them.
2. `way: student`. The checkpoint given is the teacher. A second model, `student`, reads x alone and learns
       L = L_task + l_in * KD_in + l_out * KD_out
       KD_in   mean squared error of its states of x and the teacher's, position by position
       KD_out  the same for the decoder's states of the answers (mse), or KL of the teacher's and its distribution of answers (kl)

Answers are scored by their mean log-likelihood; L_task = -log softmax(scores)[right one]. `way` has the baselines too, behind the same
data: i_o reads x; ir_o reads x and r in training and x alone in evaluation; i_ro learns to write the rationale and then the answer.

What the paper leaves open and is ours: l_in = l_out = 1; the student begins as the pre-trained model; the text of a question is `prompt`.
x is tokenised alike with and without r, which stands behind it. No official code could be read. The teacher's states are computed once
and kept on disk in fp16.
A decoder-only model is our extension. It reads [r; x; cue; y]; x sees r and itself, cue and y see x, cue and y; positions of x and y are
the student's, r takes those after them. KD_in is taken at the input of the last block, the deepest states of x that an answer reads.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.core.data.rows import IGNORE, TokenRows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.model.checkpoint import Checkpoint, check_vocabulary
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.tune.choices.rows import ChoiceRows, Columns, encode, read_questions
from modelwright.tune.choices.scoring import ChoiceScores
from modelwright.tune.choices.teacher import taught


@dataclass(frozen=True, kw_only=True)
class Knobs(Tune):
    way: Literal["teacher", "student", "i_o", "ir_o", "i_ro"] = knob(help="train the teacher, the student, or a baseline")
    student: str | None = knob(None, "way student: the pre-trained model that learns; empty: it begins as the teacher", path=True)
    question: str = knob("question", "column of the question")
    choices: str = knob("choices", "column of the choices: a list of texts, or {text, label}")
    labels: list[str] = knob([], "the same choices for every question, instead of a column; true and false are yes and no")
    answer: str = knob("answer", "column of the right choice: its index, label or text")
    rationale: str = knob("rationale", "column of the rationale: a text, or a list of sentences")
    prompt: str = knob("{question}", "text that the model is given; {question} and {choices} are filled in")
    l_in: float = knob(1.0, "weight of the distance of the question's states; 0: left out", low=0)
    l_out: float = knob(1.0, "weight of the distance on the side of the answer; 0: left out", low=0)
    kd_out: Literal["mse", "kl"] = knob("mse", "states of the answers' tokens, or the distribution of the answers")
    states: Literal["fp16", "fp32"] = knob("fp16", "type in which the teacher's states are kept on disk")


class Distance(LossTerm):
    """Mean squared error of states and the teacher's: `taught` (N, d) lie where `where` is true."""

    def __init__(self, name: str, weight: float):
        self.name, self.weight = name, weight

    def where(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x_real"] if self.name == "KD-In" else batch["targets"] != IGNORE

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return self.where(batch).sum()

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        side = "x" if self.name == "KD-In" else "y"
        ours, theirs = getattr(outputs, f"{side}_states").float(), batch[f"{side}_taught"]
        each = ((ours - theirs) ** 2).mean(-1) * self.where(batch)
        return each.flatten(1).sum(1)


class Divergence(LossTerm):
    """KL of the teacher's distribution over the answers and the student's."""

    name = "KD-Out"

    def __init__(self, weight: float):
        self.weight = weight

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1] != IGNORE).sum()

    def sums(self, batch: dict[str, Tensor], outputs: Any) -> Tensor:
        there, low = (batch["targets"] != IGNORE).any(2), -1e4  # -inf has no gradient
        ours, theirs = (v.masked_fill(~there, low).log_softmax(1) for v in (outputs.scores, batch["scores_taught"]))
        return (F.kl_div(ours, theirs, reduction="none", log_target=True) * there).sum(1)


class Taught(ChoiceScores):
    """The student's objective: batches carry what the teacher made of the rows, at the places of the student's own states."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().collate(rows)
        source = next((r for r in rows if "x_taught" in r), None)
        if source is None:
            return batch
        d = source["x_taught"].shape[-1]
        for name, where in (("x", batch["x_real"]), ("y", batch["targets"] != IGNORE)):
            flat = [r[f"{name}_taught"] for r in rows if f"{name}_taught" in r]
            batch[f"{name}_taught"] = torch.zeros(*where.shape, d)
            batch[f"{name}_taught"][where] = torch.cat(flat)
        batch["scores_taught"] = torch.zeros(batch["targets"].shape[:2])
        for i, r in enumerate(rows):
            if "scores_taught" in r:
                batch["scores_taught"][i, : len(r["scores_taught"])] = r["scores_taught"]
        return batch


class Knife(Technique):
    """The data policy and objective of each way; the student has two loss terms more."""

    name = "knife"

    def __init__(self, knobs: Knobs):
        self.knobs, self._tokenizer, self._train = knobs, None, Train()
        if knobs.student and knobs.way != "student":
            raise UserError(f"student is given and way is {knobs.way}", "only way: student trains a second model", "leave student out")
        if knobs.way == "student" and not knobs.l_in and not knobs.l_out:
            raise UserError("l_in and l_out are 0", "the student would learn nothing of the teacher", "raise one, or use way: i_o")

    # ---- the student -----------------------------------------------------------------------------------------------------
    def load(self, source: Any, dtype: Any) -> Any:
        if not self.knobs.student:
            return None
        other = Checkpoint(self.knobs.student)
        teacher, mine = (c.hf_config.get_text_config() for c in (source, other))
        if teacher.model_type != mine.model_type or teacher.hidden_size != mine.hidden_size:
            raise UserError(
                f"the student is a {mine.model_type} of width {mine.hidden_size}",
                f"the teacher is a {teacher.model_type} of width {teacher.hidden_size} and their states are compared",
                "give a student of the same architecture and width",
            )
        ours, theirs = (t and t.get_vocab() for t in (other.tokenizer(), source.tokenizer()))
        if ours != theirs:
            raise UserError("student and teacher have different tokenizers", "their states would stand at different places", "use one")
        check_vocabulary(source.tokenizer(), int(mine.vocab_size), other.folder)
        return other.model(dtype)

    # ---- data and objective ----------------------------------------------------------------------------------------------
    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> ChoiceScores:
        way = self.knobs.way
        if tokenizer is None and not model.config.is_encoder_decoder:
            raise _no_words()
        self._tokenizer, self._train, self._pairs = tokenizer, train, bool(model.config.is_encoder_decoder)
        reads = way in ("teacher", "ir_o")
        kind = Taught if way == "student" else ChoiceScores
        return kind(model, tokenizer, rationale=reads, bottleneck=way == "teacher", absent=way == "ir_o", story=way == "i_ro")

    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> ChoiceRows:
        k = self.knobs
        if tokenizer is None:
            raise _no_words()
        names = Columns(k.question, k.choices, k.answer, k.rationale, k.prompt, tuple(k.labels))
        questions, counts = read_questions(data, names, rationales=k.way != "i_o")
        made = encode(questions, tokenizer, train.context, self._pairs, story=k.way == "i_ro")
        made.facts |= counts
        return made

    def prepare(self, rows: TokenRows) -> TokenRows:
        if self.knobs.way != "student":
            return rows
        return taught(rows, self.source, self._tokenizer, self.knobs.states, self._train.batch)

    def terms(self) -> list[LossTerm]:
        k = self.knobs
        if k.way != "student":
            return []
        out = Divergence(k.l_out) if k.kd_out == "kl" else Distance("KD-Out", k.l_out)
        return [t for t in (Distance("KD-In", k.l_in), out) if t.weight]

    def facts(self) -> dict[str, Any]:
        return {"way": self.knobs.way, "scored by": "mean log-likelihood of an answer's tokens"}


def _no_words() -> UserError:
    return UserError("the checkpoint has no tokenizer", "questions are text", "add tokenizer files")


METHOD = Knife
