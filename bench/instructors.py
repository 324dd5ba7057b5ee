"""LLMs-as-Instructors on a planted weakness: a small student adds without carrying; a rule-based instructor writes new sums.

The student is a Llama of two layers over digits. It has learnt sums without a carry and differences without a borrow. Each arm gives it
the same number of new samples, written behind the interface that a model has (prompts in, texts out), read and checked by the method.
Measured: sums with a carry (the weak slice), and differences (out of the lesson's domain, learnt before).

The instructor sees what the arm shows it and no more. Under LE it sees the wrong answer, looks whether the sum that failed has a carry,
and writes sums with a carry if so. Under LEC it also sees questions that the student can do, and writes every third sample like one of
these. As a mimic it changes the digits of the question at random. Also: the recorded answers of the paper graded again, and how often the
check of arithmetic throws out a true solution of GSM8K.
"""

import argparse
import gzip
import json
import random
import re
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import SHARED, Cache, save, spread
from modelwright.core.ask.desk import Desk
from modelwright.core.ask.protocol import Answer
from modelwright.curate.generators.lessons import Asked, Settings, teach
from modelwright.curate.generators.overlap import Seen
from modelwright.curate.generators.regrade import regrade
from modelwright.curate.generators.tasks import Sample, final_number, render
from modelwright.curate.generators.verify import wrong_with

CHARS = "0123456789+-=."
ARMS = ("before", "random", "mimic", "le", "lec")
LEARNT: dict[int, dict] = {}  # what every arm of a seed starts from
_SUM = re.compile(r"(\d\d)([+-])(\d\d)")


def carries(a: int, b: int) -> bool:
    return a % 10 + b % 10 > 9


def draw(rng: random.Random, carry: bool | None, sign: str = "+") -> tuple[int, str, int]:
    """Two numbers of two digits whose result has at most two; no borrow in a difference."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if sign == "-" and a // 10 >= b // 10 and a % 10 >= b % 10:
            return a, sign, b
        if sign == "+" and a + b < 100 and carry in (None, carries(a, b)):
            return a, sign, b


def text(a: int, sign: str, b: int) -> str:
    return f"{a}{sign}{b}"


def result(question: str) -> int:
    a, sign, b = _SUM.search(question).groups()
    return int(a) + int(b) if sign == "+" else int(a) - int(b)


def line(question: str, answer: int) -> list[int]:
    """The digits of the answer stand in reverse, as carrying goes."""
    return [CHARS.index(c) for c in f"{question}={str(answer).zfill(2)[::-1]}."]


class Student:
    def __init__(self, seed: int):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=len(CHARS), max_position_embeddings=16, **sizes))

    def train(self, lines: list[list[int]], steps: int, lr: float, seed: int) -> None:
        rows, rng = torch.tensor(lines), random.Random(seed)
        opt = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0)
        for step in range(steps):
            for group in opt.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
            x = rows[[rng.randrange(len(rows)) for _ in range(64)]]  # (64, 9)
            logits = self.model(x[:, :-1]).logits[:, 5:]  # what follows "="
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 6:].flatten())
            loss.backward()
            opt.step()
            opt.zero_grad()

    @torch.inference_mode()
    def answer(self, questions: list[str]) -> list[int]:
        x = torch.tensor([[CHARS.index(c) for c in q + "="] for q in questions])
        for _ in range(2):
            x = torch.cat([x, self.model(x).logits[:, -1, :10].argmax(-1, keepdim=True)], 1)
        return [int(f"{tens}{ones}") for ones, tens in x[:, -2:].tolist()]

    def right(self, questions: list[str]) -> float:
        said = self.answer(questions)
        return 100 * statistics.mean(a == result(q) for q, a in zip(questions, said, strict=True))


class Rules:
    """The instructor: what it writes depends on what the message shows."""

    name = "rules"

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def ask(self, prompts):
        for i, prompt in enumerate(prompts):
            yield i, Answer(render("number", self.write(prompt.messages[-1][1])))

    def write(self, message: str) -> list[Sample]:
        m = int(re.search(r"Write (\d+) ", message)[1])
        asked = _SUM.findall(message)
        shown = re.search(r"\[WRONG ANSWER\]\n(\d+)", message)
        known = asked[:-1] if "answers these questions correctly" in message else []
        a, sign, b = asked[-1]
        forgot = bool(shown) and sign == "+" and int(shown[1]) != int(a) + int(b) and carries(int(a), int(b))
        samples = []
        for j in range(m):
            if known and j % 3 == 2:
                _, sign_known, _ = known[j // 3 % len(known)]
                x = draw(self.rng, False if sign_known == "+" else None, sign_known)
            elif forgot:
                x = draw(self.rng, True)
            else:
                x = draw(self.rng, None, sign)
            value = result(text(*x))
            samples.append(Sample(text(*x), f"{x[0]} {x[1]} {x[2]} = {value}\n#### {value}"))
        return samples


def once(arm: str, seed: int, a: argparse.Namespace) -> list[float]:
    rng = random.Random(seed)
    base = [text(*draw(rng, False)) for _ in range(3000)] + [text(*draw(rng, None, "-")) for _ in range(3000)]
    weak = list({text(*draw(rng, True)): 0 for _ in range(900)})
    weak_test, weak_train = weak[:300], weak[300:]
    other = list({text(*draw(rng, None, "-")): 0 for _ in range(300)})
    student = Student(seed)
    if seed not in LEARNT:
        student.train([line(q, result(q)) for q in base], a.base_steps, 3e-3, seed)
        LEARNT[seed] = {k: v.clone() for k, v in student.model.state_dict().items()}
    student.model.load_state_dict(LEARNT[seed])
    if arm != "before":
        tasks = weak_train[:60] + [text(*draw(rng, False)) for _ in range(60)] + [text(*draw(rng, None, "-")) for _ in range(60)]
        said = student.answer(tasks)
        asked = [Asked(q, str(s), s == result(q), i) for i, (q, s) in enumerate(zip(tasks, said, strict=True))]
        settings = Settings(arm, a.samples, 3, "words", True, 3, 0.8, 1000)
        lesson = teach("number", asked, Desk(Rules(seed)), settings, Seen(weak_test + other), rng)
        new = [item["sample"] for item in lesson.kept]
        assert len(new) == a.samples, (arm, len(new), lesson.reasons)
        student.train([line(s.question, int(final_number(s.answer))) for s in new], a.steps, 1e-3, seed)
    return [student.right(weak_test), student.right(other)]


def false_alarms() -> tuple[int, int]:
    with gzip.open(SHARED / "gsm8k" / "train.jsonl.gz", "rt") as file:
        rows = [json.loads(text) for text in file]
    return sum(bool(wrong_with("number", Sample(r["question"], r["answer"]))) for r in rows), len(rows)


def graded_again() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return regrade(SHARED / "llms_as_instructors", Path(folder), lambda n: None).metrics


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--base-steps", type=int, default=900)
    args.add_argument("--steps", type=int, default=100)
    args.add_argument("--samples", type=int, default=300)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    cache = Cache("instructors")
    sizes = [a.base_steps, a.steps, a.samples]
    found = {arm: [cache([arm, s, *sizes], lambda arm=arm, s=s: once(arm, s, a)) for s in range(a.seeds)] for arm in ARMS}
    alarms, solutions = cache(["alarms", 1], false_alarms)
    again = cache(["regrade", 1], graded_again)
    weak = {arm: statistics.median(v[0] for v in of) for arm, of in found.items()}
    other = {arm: statistics.median(v[1] for v in of) for arm, of in found.items()}
    order = weak["le"] > weak["mimic"] > weak["random"]
    code = again["code"]
    save(
        "instructors",
        claim="With equally many new samples LE beats mimic beats random on the weak slice; LEC keeps more out of domain (2407.00497)",
        outcome=(
            f"Sums with a carry, median of {a.seeds} seeds: LE {weak['le']:.1f} %, mimic {weak['mimic']:.1f} %, "
            f"random {weak['random']:.1f} %: the order {'holds' if order else 'does not hold'}. "
            f"Differences: LEC {other['lec']:.1f} %, LE {other['le']:.1f} %. "
            f"Recorded answers: {code['right_again']} of {code['recorded_right']} passing programs pass again, "
            f"{code['wrong_that_pass_the_published_grader']} of {code['recorded_wrong']} failing ones; {code['false_errors']} of these are "
            f"right when the whole block is run. The check of arithmetic throws out {alarms:,} of {solutions:,} true GSM8K solutions."
        ),
        columns=["arm", "sums with a carry, % right", "differences, % right"],
        rows=[[arm, spread([v[0] for v in of]), spread([v[1] for v in of])] for arm, of in found.items()],
        seeds=list(range(a.seeds)),
        notes=[
            f"{a.samples} new samples and {a.steps} steps in each arm; the instructor is a program that sees what the arm shows",
            f"graded again: {json.dumps(again)}",
        ],
    )


if __name__ == "__main__":
    main()
