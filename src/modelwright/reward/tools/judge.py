"""A trained tool reward model at work: it writes a trace, its calls are made, and the finished trace is scored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelwright.core.errors import UserError
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.models.tool_reward import ToolRewardModel
from modelwright.reward.tools.calls import ToolBox
from modelwright.reward.tools.encode import SPECIAL, bare, encode_prompt
from modelwright.reward.tools.traces import OBSERVATION, WORK, asked_for


@dataclass(frozen=True)
class Verdict:
    """A reward, the trace that it was read from, the calls that were made, and whether the trace came to its end."""

    reward: float
    trace: str
    calls: int
    finished: bool


class ToolReward:
    """f(prompts=, completions=, **columns) -> list of float, as TRL's trainers and rl.ppo call a reward; `verdicts` are of the last call.

    Greedy, at most `calls` tools for an answer. Raises UserError for a checkpoint that is no tool reward model.
    """

    def __init__(self, base: str | Path | Checkpoint, tools: ToolBox, *, calls: int = 3, max_new_tokens: int = 1024):
        source = base if isinstance(base, Checkpoint) else Checkpoint(base)
        kind = type(source.skeleton).__name__
        if not issubclass(type(source.skeleton), ToolRewardModel):
            raise UserError(f"{source.folder} writes no traces", f"it is a {kind}", "give a model that reward.themis_train wrote")
        self.model, self.tokenizer = source.model().eval(), source.tokenizer()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.tools, self.calls, self.new = tools, calls, max_new_tokens
        self.ids = dict(zip(SPECIAL, self.tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
        self.verdicts: list[Verdict] = []
        self.__name__ = "themis"  # TRL logs by this name

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        self.verdicts = [self.judge(_text(p), _text(c)) for p, c in zip(prompts, completions, strict=True)]
        return [v.reward for v in self.verdicts]

    @torch.no_grad()
    def judge(self, question: str, answer: str, context: str = "") -> Verdict:
        """Write the trace about an answer, and score it."""
        begin = encode_prompt(self.tokenizer, question, answer, context)
        ids, made, finished = list(begin), 0, False
        while not finished:
            new = self._continued(ids)
            ids += new
            end = new[-1] if new else None
            if end == self.ids[OBSERVATION] and made < self.calls:
                asked = asked_for(self.tokenizer.decode(ids[len(begin) : -1]))
                said = self.tools.observe(*asked) if asked else "The call cannot be read."
                ids += bare(self.tokenizer, f" Observation: {said}\n")
                made += 1
            elif self.ids[WORK] in ids[len(begin) :]:
                finished = end == self.tokenizer.eos_token_id
                break
            else:  # no call is left, or nothing is to be called: what remains is the rationale
                ids.append(self.ids[WORK])
            if self._room(ids) <= 0:
                break
        score = ids if finished else [*ids, self.tokenizer.eos_token_id]
        return Verdict(self.score(score), self.tokenizer.decode(ids[len(begin) :]), made, finished)

    @torch.no_grad()
    def score(self, ids: list[int]) -> float:
        """The reward of a finished trace, prompt included. UserError where it is not finite."""
        found = float(self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits[0, 0])
        if found != found or abs(found) == float("inf"):
            raise UserError("a reward is not finite", "the reward model gave NaN or infinity")
        return found

    def _room(self, ids: list[int]) -> int:
        text = self.model.config.get_text_config()
        most = int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 30)
        return most - len(ids) - 64  # for an observation and the end

    def _continued(self, ids: list[int]) -> list[int]:
        room = min(self.new, self._room(ids))
        if room < 1:
            return []
        given = torch.tensor([ids], device=self.model.device)
        ends = [self.ids[OBSERVATION], self.tokenizer.eos_token_id]
        out = self.model.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        return out[0, len(ids) :].tolist()


def _text(said: Any) -> str:
    return said if isinstance(said, str) else "\n".join(str(m["content"]) for m in said)
