"""Keep only the instruction rows whose response a judge accepts, and that do not contradict a known answer.

When to use it: generated data, before anything is trained on it.

Paper: OpenBezoar (arXiv 2404.12195), whose judge was GPT-4. The wording is ours, and so is the comparison with gold answers.

- The verdict is constrained. `verdict: text` takes a reply that is one of the allowed words and nothing else (yes or no, or a score from 1
  to 10); `verdict: logits` takes the probabilities of yes and no, read off the judge's next token. Anything else is unknown.
- A row is kept for a yes, or a score of at least `least`. Unknown is never kept, and is counted apart; so is a request that failed.
- A row with a gold answer (column `gold`) that is a number, yes or no, or a letter is first compared with it: a response that says
  something else is rejected without asking. A response in which no such answer can be read is left to the judge.

Every column stays. Kept rows get `verdict`, `verdict_text` and `judge`. The filter never adds or changes a row.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from modelwright.core.ask.protocol import Answer, Prompt
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Generator, knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.curate.generators.grade import grade_number, last_number
from modelwright.curate.generators.replies import one_word
from modelwright.curate.generators.rows import Harvest, Row, read_rows
from modelwright.curate.generators.writers import open_writer


@dataclass(frozen=True)
class Knobs(Generator):
    data: Data = knob(Data(), "rows of instruction and response, or of messages; empty: the dataset of an earlier step")
    ask: Literal["yes_no", "score"] = knob("yes_no", "what the judge says")
    least: int = knob(7, "score from which a row is kept, of 10", low=1, high=10)
    verdict: Literal["text", "logits"] = knob("text", "read the reply, or the probabilities of yes and no")
    gold: str = knob("gold", "column of known answers; rows without it are only judged")


_SCORES = tuple(str(n) for n in range(1, 11))
_WISH = {
    "yes_no": "Is the response acceptable? Answer with one word: yes or no.",
    "score": "Score it from 1 to 10. Answer with the number.",
}
_RULES = "A good response does what the instruction says, is true, complete and clear, and harms nobody."
_LETTER = re.compile(r"(?:answer|choice|option)(?: is)?:?\s*\(?([A-E])\b", re.I)
_YES_NO = re.compile(r"\b(yes|no)\b", re.I)


def judge_filter(knobs: Knobs, job: StepContext) -> EvalResult:
    """Write dataset.jsonl and removed.jsonl."""
    if knobs.verdict == "logits" and knobs.ask == "score":
        raise UserError(
            "verdict=logits does not fit ask=score", "probabilities of yes and no are read", "use ask: yes_no, or verdict: text"
        )
    rows = read_rows(knobs.data, response=True)
    desk, harvest = open_writer(knobs, job.folder, job.seed), Harvest()
    open_rows: list[Row] = []
    for row in rows:
        if contradicts(row.response, str(row.columns.get(knobs.gold) or "")):
            harvest.drop("contradicts the gold answer", row.place, instruction=row.instruction, response=row.response)
        else:
            open_rows.append(row)
    with job.progress.task("judge", len(open_rows)) as desk.tick:
        answers = desk(_prompt(row, knobs) for row in open_rows)
    verdicts: Counter[str] = Counter()
    for row, answer in zip(open_rows, answers, strict=True):
        verdict = verdict_of(answer, knobs)
        verdicts[verdict] += 1
        if accepted(verdict, knobs):
            harvest.kept.append({**row.columns, "verdict": verdict, "verdict_text": answer.text, "judge": desk.judge.name})
        else:
            reason = {"unknown": "verdict is not known", "failed": f"request failed: {answer.status}"}.get(
                verdict, "judged not good enough"
            )
            harvest.drop(reason, row.place, instruction=row.instruction, response=row.response, verdict=answer.text)
    harvest.write(job.folder)
    share = len(harvest.kept) / len(rows)
    text = f"{len(harvest.kept):,} of {len(rows):,} rows are kept ({100 * share:.0f} %)."
    return harvest.finding(text, desk.plain(), {"rows": len(rows), "verdicts": dict(verdicts)})


def question(row: Row, ask: str) -> str:
    """What the judge is asked about a row."""
    system = f"System message:\n{row.system}\n\n" if row.system else ""
    return f"{system}Instruction:\n{row.instruction}\n\nResponse:\n{row.response}\n\n{_RULES} {_WISH[ask]}"


def _prompt(row: Row, knobs: Knobs) -> Prompt:
    messages = (("user", question(row, knobs.ask)),)
    return Prompt(messages, 0, options=("yes", "no")) if knobs.verdict == "logits" else Prompt(messages, 8)


def verdict_of(answer: Answer, knobs: Knobs) -> str:
    """yes, no, a score, unknown or failed."""
    if answer.failed:
        return "failed"
    if knobs.verdict == "logits":
        if answer.probabilities is None or answer.probabilities[0] == answer.probabilities[1]:
            return "unknown"
        return "yes" if answer.probabilities[0] > answer.probabilities[1] else "no"
    return one_word(answer.text, _SCORES if knobs.ask == "score" else ("yes", "no")) or "unknown"


def accepted(verdict: str, knobs: Knobs) -> bool:
    return verdict == "yes" or (verdict.isdigit() and int(verdict) >= knobs.least)


def contradicts(response: str, gold: str) -> bool:
    """Whether a response says another number, letter, or yes or no than the gold answer; false where either says none."""
    bare = gold.strip().strip(".()").lower()
    if bare in ("yes", "no"):
        said = _YES_NO.findall(response)
        return bool(said) and bare not in {said[0].lower(), said[-1].lower()}
    if re.fullmatch(r"[a-e]", bare):
        said = _LETTER.findall(response)
        return bool(said) and said[-1].lower() != bare
    if re.fullmatch(r"[$€£]?\s*-?[\d,]*\.?\d+\s*%?", gold.strip()) or re.search(r"####\s*-?[\d,.]+\s*$", gold):
        return bool(last_number(response)) and not grade_number(gold.rstrip("% "), response).right
    return False


METHOD = judge_filter
