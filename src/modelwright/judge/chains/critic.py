"""Who scores chains for AoR: a language model, asked in our own wording, or a program.

The criteria and their weights are the paper's. A reply counts when it gives every chain exactly one score from 0 to 10 in the
form that was asked for, "Chain 1: 7/10"; the last one stands where a chain is scored twice. Otherwise the request is made
again; at temperature 0 it is not, because the reply would be the same.
"""

import re
from collections.abc import Callable

from modelwright.core.ask.desk import Counts, Desk
from modelwright.core.ask.protocol import Prompt
from modelwright.judge.chains import letters
from modelwright.judge.chains.scoring import Request, Scores

VERIFIERS: dict[str, Callable[[str, str], float]] = {"letters": letters.score}
_SCORE = re.compile(r"\b(?:chain|option)\s*(\d+)\W+(?:(?:total\s+)?score\W+)?(\d+(?:\.\d+)?)\s*/\s*10\b", re.I)
_TOKENS = 200  # of reply, per chain

_LOCAL = """You grade chains of reasoning that lead to the same answer. Grade how each was reasoned, not its answer. Points:
- up to 3: each step follows from what is given or from earlier steps, without contradiction
- up to 3: the method fits the problem and is carried out properly
- up to 2: nothing that is needed is missing, and it is clear
- up to 2: facts and rules are used correctly"""
_GLOBAL = """You grade chains of reasoning that lead to different answers, side by side. At most one answer is right. Points:
- up to 3: the approach is valid for the problem
- up to 3: the steps agree with each other and with the final answer
- up to 2: nothing that is needed is missing, and it is clear
- up to 2: facts and rules are used correctly"""


def render(r: Request, temperature: float = 1.0, attempt: int = 0) -> Prompt:
    """The prompt of one request."""
    word = "Option" if r.compare else "Chain"
    parts = [f"Question:\n{r.question}"]
    parts += [f"A chain that got {score:g}/10:\n{chain}" for chain, score in r.examples]
    parts += [f"{word} {i}:\n{chain.strip()}" for i, chain in enumerate(r.chains, 1)]
    parts.append(f'Go through them one after the other. Then give one line for each, as in "{word} 1: 7/10", and nothing after that.')
    messages = (("system", _GLOBAL if r.compare else _LOCAL), ("user", "\n\n".join(parts)))
    return Prompt(messages, _TOKENS * len(r.chains), temperature, attempt=attempt)


def parse_scores(text: str, n: int) -> Scores:
    """Scores of chains 1 to n, or None when one is missing, too many or out of range."""
    found = {int(i): float(score) for i, score in _SCORE.findall(text)}
    if set(found) != set(range(1, n + 1)) or max(found.values()) > 10:
        return None
    return [found[i] for i in range(1, n + 1)]


class Critic:
    """A language model as the scorer. `unread` counts the replies that did not parse."""

    def __init__(self, desk: Desk, temperature: float = 1.0, retries: int = 5):
        self.desk, self.temperature, self.retries = desk, temperature, retries if temperature else 1
        self.unread = 0

    def __call__(self, requests: list[Request]) -> list[Scores]:
        scores: list[Scores] = [None] * len(requests)
        left = list(range(len(requests)))
        for attempt in range(self.retries):
            prompts = [render(requests[i], self.temperature, requests[i].round * self.retries + attempt) for i in left]
            again = []
            for i, answer in zip(left, self.desk(prompts), strict=True):
                if not answer.failed:
                    scores[i] = parse_scores(answer.text, len(requests[i].chains))
                    if scores[i] is None:
                        self.unread += 1
                        again.append(i)
            left = again
        return scores

    def plain(self) -> Counts:
        return self.desk.plain() | {"unread_replies": self.unread}


class Verifier:
    """A program as the scorer: the same score for a chain wherever it stands."""

    def __init__(self, name: str):
        self.name, self.score, self.requests = name, VERIFIERS[name], 0

    def __call__(self, requests: list[Request]) -> list[Scores]:
        self.requests += len(requests)
        return [[self.score(r.question, c) for c in r.chains] for r in requests]

    def plain(self) -> Counts:
        return {"judge": f"program: {self.name}", "requests": self.requests}
