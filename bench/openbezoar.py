"""OpenBezoar's parts on a small student: the judge's filter against no filter, and what a continued adapter forgets.

The student is that of bench/instructors: two layers over digits, which has learnt sums without a carry and differences without a borrow.

Filter: rows ask for sums with a carry; 30 % of the responses are wrong. A judge that errs in 5 % of its verdicts, and gives 5 % in no
readable form, filters them through curate.judge_filter. Arms have equally many rows and steps: unfiltered, filtered, and rows without
planted errors. Measured on new sums with a carry.

Sequence: one adapter (q, k and v, r 16, alpha 16) goes on through three sets: sums with a carry, differences with a borrow, the larger of
two numbers. After each stage all three are measured; the control learns the three sets mixed, in as many steps.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import modelwright
from common import Cache, save, spread
from instructors import Student, draw, line, text

BAD, ERRS, UNREADABLE = 0.3, 0.05, 0.05
ARMS = ("before", "unfiltered", "filtered", "no bad rows")
STAGES = ("sums with a carry", "differences with a borrow", "the larger one")
BASES: dict[int, dict] = {}


def base(seed: int, steps: int) -> Student:
    """The student with what it knows before."""
    rng = random.Random(seed)
    known = [text(*draw(rng, False)) for _ in range(3000)] + [text(*draw(rng, None, "-")) for _ in range(3000)]
    student = Student(seed)
    if seed not in BASES:
        student.train([line(q, answer(q)) for q in known], steps, 3e-3, seed)
        BASES[seed] = {k: v.clone() for k, v in student.model.state_dict().items()}
    student.model.load_state_dict(BASES[seed])
    return student


def answer(question: str) -> int:
    a, b = int(question[:2]), int(question[3:])
    return {"+": a + b, "-": a - b, ".": max(a, b)}[question[2]]


def questions(rng: random.Random, stage: str, n: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < n:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if stage == STAGES[0] and a + b < 100 and a % 10 + b % 10 > 9:
            found[f"{a}+{b}"] = None
        elif stage == STAGES[1] and a > b and a % 10 < b % 10:
            found[f"{a}-{b}"] = None
        elif stage == STAGES[2]:
            found[f"{a}.{b}"] = None
    return list(found)


def right(student: Student, asked: list[str]) -> float:
    return 100 * statistics.mean(said == answer(q) for q, said in zip(asked, student.answer(asked), strict=True))


# ---- filter -------------------------------------------------------------------------------------------------------------
def filtered(rows: list[dict], rng: random.Random) -> tuple[list[dict], dict]:
    """What curate.judge_filter keeps with the judge described above."""
    said = []
    for row in rows:
        good = int(row["response"]) == answer(row["instruction"])
        verdict = "yes" if good != (rng.random() < ERRS) else "no"
        said.append("I would say so." if rng.random() < UNREADABLE else verdict)
    with tempfile.TemporaryDirectory() as tmp:
        data, judge = Path(tmp) / "rows.jsonl", Path(tmp) / "judge.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        asked = (f"Instruction:\n{r['instruction']}\n\nResponse:\n{r['response']}\n" for r in rows)
        judge.write_text("".join(json.dumps({"prompt": p, "answer": v}) + "\n" for p, v in zip(asked, said, strict=True)))
        done = modelwright.run("curate.judge_filter", to=Path(tmp) / "out", data=str(data), recorded=str(judge))
        kept = [json.loads(row) for row in (done.to / "dataset.jsonl").read_text().splitlines()]
        return kept, done.steps[0]["metrics"]


def once(arm: str, seed: int, a: argparse.Namespace) -> list[float]:
    rng = random.Random(seed)
    asked = questions(rng, STAGES[0], 200 + 2 * a.rows)
    test, asked = asked[:200], asked[200:]
    student = base(seed, a.base_steps)
    if arm == "before":
        return [right(student, test), 0.0]
    rows = []
    for q in asked:
        wrong = arm != "no bad rows" and rng.random() < BAD
        rows.append({"instruction": q, "response": str(answer(q) - 10 if wrong else answer(q))})
    if arm == "filtered":
        rows, _ = filtered(rows, rng)
    rows = rows[: a.rows]
    assert len(rows) == a.rows, (arm, len(rows))
    bad = 100 * statistics.mean(int(r["response"]) != answer(r["instruction"]) for r in rows)
    student.train([line(r["instruction"], int(r["response"])) for r in rows], a.steps, 1e-3, seed)
    return [right(student, test), bad]


# ---- one adapter over three sets ------------------------------------------------------------------------------------------
def sequence(seed: int, a: argparse.Namespace, mixed: bool) -> list[list[float]]:
    """Accuracy on the three sets before, and after each stage; of the control before and after."""
    rng = random.Random(seed)
    student = base(seed, a.base_steps)
    sets = {s: questions(rng, s, 200 + a.rows) for s in STAGES}
    rows = {s: [line(q, answer(q)) for q in asked[200:]] for s, asked in sets.items()}
    torch.manual_seed(seed)
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    student.model = get_peft_model(student.model, lora)

    def measured() -> list[float]:
        student.model.eval()
        return [right(student, sets[s][:200]) for s in STAGES]

    table = [measured()]
    stages = [[row for s in STAGES for row in rows[s]]] if mixed else [rows[s] for s in STAGES]
    for stage in stages:
        student.model.train()
        student.train(stage, a.lora_steps * (3 if mixed else 1), 3e-3, seed)
        table.append(measured())
    return table


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--base-steps", type=int, default=900)
    args.add_argument("--steps", type=int, default=200)
    args.add_argument("--lora-steps", type=int, default=150)
    args.add_argument("--rows", type=int, default=400)
    args.add_argument("--seeds", type=int, default=3)
    a = args.parse_args()
    torch.set_num_threads(1)
    cache = Cache("openbezoar")
    sizes = [a.base_steps, a.steps, a.lora_steps, a.rows]
    found = {arm: [cache([arm, s, *sizes], lambda arm=arm, s=s: once(arm, s, a)) for s in range(a.seeds)] for arm in ARMS}
    tables = [cache(["sequence", s, *sizes], lambda s=s: sequence(s, a, False)) for s in range(a.seeds)]
    mixed = [cache(["mixed", s, *sizes], lambda s=s: sequence(s, a, True)) for s in range(a.seeds)]
    score = {arm: [v[0] for v in of] for arm, of in found.items()}
    better = sum(f > u for f, u in zip(score["filtered"], score["unfiltered"], strict=True))
    lost = statistics.median(t[1][0] - t[3][0] for t in tables)
    rows = [[f"filter: {arm}", spread(score[arm]), f"{statistics.mean(v[1] for v in found[arm]):.1f} % wrong rows"] for arm in ARMS]
    for name, group in (("adapter continued", tables), ("adapter on the mix", mixed)):
        for i in range(len(group[0])):
            at = "before" if i == 0 else f"after {STAGES[i - 1]}" if group is tables else "after all"
            values = ", ".join(f"{s}: {spread([t[i][j] for t in group])}" for j, s in enumerate(STAGES))
            rows.append([f"{name}, {at}", values, ""])
    save(
        "openbezoar",
        claim="With 30 % bad rows, filtered data beats unfiltered of equal size; a continued adapter forgets earlier sets (2404.12195)",
        outcome=(
            f"New sums, median: filtered {statistics.median(score['filtered']):.1f} %, unfiltered "
            f"{statistics.median(score['unfiltered']):.1f} %, without planted errors {statistics.median(score['no bad rows']):.1f} %; "
            f"filtered is better on {better} of {a.seeds} seeds. The continued adapter loses {lost:.1f} points on its first set by the end."
        ),
        columns=["arm", "% right", ""],
        rows=rows,
        seeds=list(range(a.seeds)),
        notes=[
            f"{a.rows} rows and {a.steps} steps in each arm of the filter; {a.lora_steps} steps in each stage of the adapter",
            "SFT before DPO against DPO alone is not measured here",
        ],
    )


if __name__ == "__main__":
    main()
