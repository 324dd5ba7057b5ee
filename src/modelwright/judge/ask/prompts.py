"""The strategies of LLMBar (2310.07641) as parts of a prompt, in our own wording.

What a strategy adds is the paper's: the rules (execute the instruction first; nothing more or less than it asks; no favour
for a place), an explanation before the verdict, questions that fit the instruction, an answer of the judge's own to compare
with, both orders reconciled, demonstrations, ratings from 0 to 9. The limits on answer tokens are the published code's. Its
logit bias against words such as "Both" is left out: it needs each vendor's tokenizer.
"""

from dataclasses import dataclass
from typing import Literal

from modelwright.core.ask.protocol import Prompt

LIMITS = {"direct": 50, "explained": 300, "questions": 150, "reference": 384}
VERDICTS = ("Output (a)", "Output (b)")
RATINGS = tuple("0123456789")


@dataclass(frozen=True)
class Strategy:
    """Parts of a prompt. `recorded` is the name that the published runs have, `short` the one in pictures."""

    recorded: str
    short: str
    rules: bool = True
    explain: bool = False
    questions: bool = False
    reference: bool = False
    shots: int = 0
    reconcile: Literal["", "direct", "explained"] = ""
    rating: bool = False


STRATEGIES = {
    "vanilla": Strategy("Vanilla_NoRules", "V", rules=False),
    "rules": Strategy("Vanilla", "R"),
    "cot": Strategy("CoT", "CoT", explain=True),
    "metrics": Strategy("Metrics", "M", questions=True),
    "reference": Strategy("Reference", "Ref", reference=True),
    "metrics_reference": Strategy("Metrics_Reference", "M+R", questions=True, reference=True),
    "swap": Strategy("Swap", "S", explain=True, reconcile="direct"),
    "swap_cot": Strategy("Swap_CoT", "S+C", explain=True, reconcile="explained"),
    "one_shot": Strategy("Vanilla_1shot", "1", shots=1),
    "two_shot": Strategy("Vanilla_2shot", "2", shots=2),
    "rating_vanilla": Strategy("Rating_NoRules", "rV", rules=False, rating=True),
    "rating": Strategy("Rating", "r", rating=True),
    "rating_metrics": Strategy("Rating_Metrics", "rM", questions=True, rating=True),
    "rating_reference": Strategy("Rating_Reference", "rR", reference=True, rating=True),
    "rating_metrics_reference": Strategy("Rating_Metrics_Reference", "rMR", questions=True, reference=True, rating=True),
}
RECORDED = {s.recorded: name for name, s in STRATEGIES.items()}

_PAIR = "You judge which of two outputs carries out an instruction better."
_ONE = "You judge how well an output carries out an instruction."
_RULES = """How to judge:
- First of all, does the output do what the instruction says? Only then look at whether it is helpful, correct and well written.
- An output should give what was asked for, no more and no less. Saying or doing something else counts against it."""
_NO_PLACE = "- Which output comes first means nothing."
_DIRECT = 'Reply with "Output (a)" or "Output (b)" and nothing else.'
_EXPLAINED = (
    'Say briefly why, without naming a winner first. Then end with a line of its own: "Output (a) is better." or "Output (b) is better."'
)
_RATE = "Reply with one whole number from 0 (does not do it at all) to 9 (could not be better) and nothing else."
_SHOTS = (
    ("Name the three states of matter taught at school, separated by commas.", "solid, liquid, gas", "Matter is anything with mass.", 0),
    ("Rewrite in the past tense: She walks home.", "She is walking home now, as every day.", "She walked home.", 1),
)

Aids = tuple[str, str]  # questions and a reference; empty where the strategy has none


def questions_prompt(instruction: str) -> Prompt:
    """Ask for what an output must be checked for."""
    return Prompt(
        (
            ("system", "You help to judge how well instructions are carried out."),
            (
                "user",
                f"Instruction:\n{instruction}\n\nWrite at most three short questions that one would ask about an output to see whether it "
                "carries out this very instruction well. Put the most important one first, one a line, and nothing else.",
            ),
        ),
        LIMITS["questions"],
    )


def reference_prompt(instruction: str) -> Prompt:
    """Ask for an answer of the judge's own."""
    return Prompt((("system", "You carry out instructions."), ("user", instruction)), LIMITS["reference"])


def compare_prompt(s: Strategy, instruction: str, first: str, second: str, aids: Aids = ("", "")) -> Prompt:
    """Ask which of two outputs is better, the first shown as (a)."""
    form = "explained" if s.explain else "direct"
    turns = [("system", _system(_PAIR, f"{_RULES}\n{_NO_PLACE}" if s.rules else "", _EXPLAINED if s.explain else _DIRECT))]
    for asked, a, b, better in _SHOTS[: s.shots]:
        turns += [("user", _pair(asked, a, b)), ("assistant", VERDICTS[better])]
    return Prompt((*turns, ("user", _pair(instruction, first, second, aids))), LIMITS[form], options=() if s.explain else VERDICTS)


def reconcile_prompt(s: Strategy, instruction: str, first: str, second: str, for_first: str, for_second: str) -> Prompt:
    """Show two explanations that contradict each other and ask again."""
    explained = s.reconcile == "explained"
    system = _system(_PAIR, f"{_RULES}\n{_NO_PLACE}" if s.rules else "", _EXPLAINED if explained else _DIRECT)
    user = (
        f"{_pair(instruction, first, second)}\n\nTwo judges disagree. Either may be wrong.\n\n"
        f"One says that Output (a) is better:\n{for_first}\n\nThe other says that Output (b) is better:\n{for_second}\n\nWhich is better?"
    )
    turns = (("system", system), ("user", user))
    return Prompt(turns, LIMITS[s.reconcile or "direct"], options=() if explained else VERDICTS)


def rating_prompt(s: Strategy, instruction: str, output: str, aids: Aids = ("", "")) -> Prompt:
    """Ask for a rating of one output."""
    system = _system(_ONE, _RULES if s.rules else "", _RATE)
    user = f"Instruction:\n{instruction}\n\nOutput:\n{output}{_aids(aids)}\n\nYour rating?"
    return Prompt((("system", system), ("user", user)), LIMITS["direct"], options=RATINGS)


def _system(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


def _pair(instruction: str, first: str, second: str, aids: Aids = ("", "")) -> str:
    return f"Instruction:\n{instruction}\n\nOutput (a):\n{first}\n\nOutput (b):\n{second}{_aids(aids)}\n\nWhich is better?"


def _aids(aids: Aids) -> str:
    questions, reference = aids
    return (f"\n\nQuestions to ask:\n{questions}" if questions else "") + (
        f"\n\nAn answer of your own, to compare with:\n{reference}" if reference else ""
    )
