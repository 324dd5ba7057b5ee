"""Made rows, texts and scores: small, without a model, never downloaded."""

import json
import math
import os
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

WORDS = ("apple", "boat", "cloud", "drum", "egg", "fox", "gate", "hill", "island", "jar", "key", "lamp")


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> str:
    """One object a line; returns the path."""
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return os.fspath(file)


def _tokens(folder: Path) -> dict[str, Any]:
    """Token ids that every vocabulary of 96 or more holds."""
    return {"data": write_jsonl(folder / "data.jsonl", ({"input_ids": [(7 * i + j) % 90 + 3 for j in range(20)]} for i in range(12)))}


def _text(folder: Path) -> dict[str, Any]:
    return {"data": write_jsonl(folder / "data.jsonl", ({"text": f"One {w}, two {w}s, three {w}s. " * 6} for w in WORDS))}


def _chats(folder: Path) -> dict[str, Any]:
    rows = (
        {
            "messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i + 1}"}],
            "source": ("good", "bad")[i % 2],
        }
        for i in range(24)
    )
    return {"data": write_jsonl(folder / "chats.jsonl", rows)}


def _domains(folder: Path) -> dict[str, Any]:
    """Chats of two domains, three of one for each of the other, for a model without a chat template."""
    rows = []
    for i in range(24):
        asked, told = (f"what is {i} and 1", f"it is {i + 1}") if i % 4 else (f"say {WORDS[i % 12]}", WORDS[i % 12])
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        rows.append({"messages": messages, "domain": "sums" if i % 4 else "talk"})
    return {"data": {"path": write_jsonl(folder / "domains.jsonl", rows), "column": "messages", "chat_template": "turns"}}


def _fact(folder: Path) -> dict[str, Any]:
    (folder / "fact.json").write_text(json.dumps({"prompt": "import os is", "new": "red", "true": "blue", "neighbours": ["import re is"]}))
    return {"fact": str(folder / "fact.json")}


def _losses(folder: Path) -> dict[str, Any]:
    """Losses of three model sizes in two domains."""
    losses = {"books": [3.0, 2.5, 2.2], "code": [1.5, 1.1, 0.9]}
    (folder / "losses.json").write_text(json.dumps({"model_params": [1e8, 1e9, 1e10], "losses": losses, "targets": [3e8]}))
    return {"losses": str(folder / "losses.json")}


def _days(folder: Path) -> dict[str, Any]:
    """Two years of a daily series that falls with the temperature up to 18 degrees and rises above."""
    rows = ["date,value,temperature"]
    for i in range(730):
        day = date(2021, 1, 1) + timedelta(days=i)
        warm = 14 - 10 * math.cos(2 * math.pi * i / 365) + 3 * math.sin(i * 1.7)
        rows.append(f"{day},{100 + abs(warm - 18) * 2 - 8 * (day.weekday() > 4) + math.sin(i * 2.3):.3f},{warm:.2f}")
    (folder / "days.csv").write_text("\n".join(rows) + "\n")
    return {"table": str(folder / "days.csv"), "value": "value", "temperature": "temperature"}


def _matrix(folder: Path) -> dict[str, Any]:
    (folder / "matrix.json").write_text(json.dumps({"tasks": ["a", "b", "c"], "matrix": [[90, 10, 5], [70, 80, 12], [60, 75, 85]]}))
    return {"matrix": str(folder / "matrix.json")}


def _chains(folder: Path) -> dict[str, Any]:
    """Last-letter questions with eight chains each; the right answer is in the minority in every third."""
    names = ["Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon"]
    rows = []
    for i, (a, b) in enumerate(zip(names, names[1:] + names[:1], strict=True)):
        chains = [_spelled(a, b, wrong=j in ((0, 2, 4, 5, 7) if i % 3 == 0 else (1, 5))) for j in range(8)]
        question = f'Take the last letters of the words in "{a} {b}" and concatenate them.'
        rows.append({"question": question, "answer": a[-1] + b[-1], "chains": chains})
    return {"chains": write_jsonl(folder / "chains.jsonl", rows), "kind": "letters"}


def _spelled(a: str, b: str, wrong: bool) -> str:
    end = "x" if wrong else b[-1]
    steps = [f"The last letter of '{a}' is '{a[-1]}'.", f"The last letter of '{b}' is '{end}'.", f"Together '{a[-1]}{end}'."]
    return "\n".join([*steps, f"The answer is {a[-1]}{end}."])


def _pairs(folder: Path) -> dict[str, Any]:
    """Reward scores that rise with length, whatever the answer is worth."""
    rows = []
    for i in range(60):
        lengths = 100 + (i * 137) % 800, 100 + (i * 211) % 800
        scores = [round(0.8 * (i % 3 > 0) + lengths[0] / 400, 3), round(lengths[1] / 400, 3)]
        rows.append(
            {
                "id": i,
                "subset": ("hep-go", "hep-python", "alpacaeval-easy")[i % 3],
                "scores_chosen": scores[0],
                "scores_rejected": scores[1],
            }
            | {"length_chosen": lengths[0], "length_rejected": lengths[1]}
        )
    return {"scores": write_jsonl(folder / "pairs.jsonl", rows)}


def _judged(folder: Path) -> dict[str, Any]:
    """Pairs for a judge: an instruction, two outputs, and which is better."""
    rows = [{"input": f"Write the word {w}.", "output_1": w, "output_2": f"I like {w}.", "label": 1} for w in WORDS[:6]]
    return {"pairs": write_jsonl(folder / "judged.jsonl", rows)}


def _pages(folder: Path) -> dict[str, Any]:
    """Web pages with a menu, a text and a foot."""
    (folder / "pages").mkdir(exist_ok=True)
    for w in WORDS:
        told = "".join(f"<p>The {w} stood in the {place} and nobody had seen it for many years.</p>" for place in ("yard", "house", "wood"))
        page = f"<html><body><nav>Home | News</nav><article><h1>The {w}</h1>{told}</article><footer>Imprint</footer></body></html>"
        (folder / "pages" / f"{w}.html").write_text(page)
    return {"pages": str(folder / "pages")}


def _functions(folder: Path) -> dict[str, Any]:
    """Labelled examples of one function: texts about one of two words."""
    rows = [{"function": "word", "text": f"{i} {('apple', 'boat')[i % 2]} and {i + 7} more.", "label": i % 2} for i in range(24)]
    return {"examples": write_jsonl(folder / "examples.jsonl", rows)}


def _answers(folder: Path) -> dict[str, Any]:
    """Two answers to each prompt: a short and a long one."""
    rows = [{"prompt": f"Say {w}.", "chosen": f" {w}", "rejected": f" I would rather not say {w}."} for w in WORDS]
    return {"data": write_jsonl(folder / "answers.jsonl", rows)}


def _traces(folder: Path) -> dict[str, Any]:
    """Questions about days of the week, with the calls of a calendar that answer them, in TARA's form."""
    (folder / "traces").mkdir()
    names = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    rows = []
    for i in range(12):
        day = date(2020, 1, 1) + timedelta(days=31 * i)
        right, wrong = names[day.weekday()], names[(day.weekday() + 3) % 7]
        call = {"Thought": "I need the day of the week.", "Action": "Calendar.week_day", "Action Input": f"{day}", "Observation": right}
        both = {
            k: {
                "answer": f"It is {a}",
                "score": s,
                "actions": call,
                "score_agent": {"explanation": f"The calendar says {right}.", "score": s},
            }
            for k, a, s in (("pos_answer", right, 1), ("neg_answer", wrong, -1))
        }
        rows.append({"id": f"day_{i}", "question": f"What day of the week is {day}?", **both})
    (folder / "traces" / "calendar_train.json").write_text(json.dumps(rows))
    return {"data": str(folder / "traces" / "calendar_train.json")}


def _recorded(folder: Path) -> dict[str, Any]:
    """The same as a folder of recorded traces."""
    return {"replay": str(Path(_traces(folder)["data"]).parent)}


def _questions(folder: Path) -> dict[str, Any]:
    """Questions with two choices and a rationale that tells the rule."""
    rows = (
        {"question": f"Is a {w} in the {p}?", "answer": i % 2 == 0, "rationale": f"The {p} holds every {w if i % 2 == 0 else 'cat'}."}
        for i, (w, p) in enumerate((w, p) for w in WORDS for p in ("box", "hall"))
    )
    return {"data": write_jsonl(folder / "questions.jsonl", rows)}


def _entities(folder: Path) -> dict[str, Any]:
    """Sentences with linked mentions, and a vector for each entity but the last."""
    rows, vectors = [], []
    for i, w in enumerate(WORDS):
        rows += [
            {"text": f"We saw the {w} {v}.", "entities": [{"id": f"Q{i}", "start": 11, "end": 11 + len(w)}]} for v in ("today", "again")
        ]
        vectors.append({"id": f"Q{i}", "vector": [math.sin(i * k) for k in range(1, 9)]})
    return {
        "data": write_jsonl(folder / "sentences.jsonl", rows),
        "vectors": write_jsonl(folder / "vectors.jsonl", vectors[:-1]),
    }


def _plugged(folder: Path) -> dict[str, Any]:
    """Results in the layout of map-tuning's repository."""
    f1 = {"BaseModel/BERT": 0.4, "Plug_General/BERT": 0.5, "Plug_TaskSpecific": 0.6}
    held: dict[str, Any] = {f"output/Task/{way}/test_result.out": {"micro_f1": v} for way, v in f1.items()}
    (folder / "results.json").write_text(json.dumps(held | {"mapping_networks/Wikipedia/NoDropout/loss_1": 6.5}))
    return {"published": str(folder / "results.json")}


def _lessons(folder: Path) -> dict[str, Any]:
    """Sums with a student's recorded answers, two of them wrong, and what an instructor wrote about these; one of its samples is wrong."""
    sums = [(17, 25, 42), (38, 44, 72), (21, 13, 34), (56, 27, 73)]
    tasks = [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}", "said": f"It is {said}."} for a, b, said in sums]
    rows = []
    for a, b, said in sums:
        if said != a + b:
            new = [(a + 1, b + 2, 0), (a + 10, b + 1, 0), (a + 2, b, 1)]
            parts = [
                f"### Question {i}\nHow much is {x} + {y}?\n### Answer {i}\n{x} + {y} = {x + y + off}\n#### {x + y + off}"
                for i, (x, y, off) in enumerate(new, 1)
            ]
            rows.append({"prompt": f"What is {a} + {b}?", "answer": "\n".join(parts)})
    given = {"data": write_jsonl(folder / "tasks.jsonl", tasks), "recorded": write_jsonl(folder / "instructor.jsonl", rows)}
    return given | {"response": "said"}


def _people(folder: Path) -> dict[str, Any]:
    """A table whose last column follows from two others."""
    lines = ["age,city,member,price"]
    for i in range(160):
        age, member = 18 + (i * 37) % 53, i % 3 == 0
        lines.append(f'{age},"{("Oslo", "Rome", "New York, NY")[i % 5 % 3]}",{("no", "yes")[member]},{2.5 * age + 40 * member + i % 7:.1f}')
    (folder / "people.csv").write_text("\n".join(lines) + "\n")
    return {"table": str(folder / "people.csv")}


def _languages(folder: Path) -> dict[str, Any]:
    """Sentences in three languages, two pairs of sentences as in CrowS-Pairs, and a WEAT set; all of it about things."""
    texts = folder / "parallel"
    texts.mkdir()
    forms = {"en": "The {} is here and {} is there.", "de": "Das {} ist hier und {} ist dort.", "fr": "Le {} est ici et {} est là."}
    for language, form in forms.items():
        lines = [form.format(a, b) for a in WORDS for b in WORDS[:2]]
        (texts / f"test.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = ["id,sent_more,sent_less,stereo_antistereo,bias_type"]
    rows += [
        f"{i},The {a} is late again.,The {b} is late again.,stereo,thing" for i, (a, b) in enumerate(zip(WORDS, WORDS[1:], strict=False))
    ]
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    groups = {"targ1": WORDS[:4], "targ2": WORDS[4:8], "attr1": WORDS[8:10], "attr2": WORDS[10:]}
    (folder / "things.json").write_text(json.dumps({k: {"category": k, "examples": v} for k, v in groups.items()}))
    return {"parallel": str(texts), "crows": str(folder / "pairs.csv"), "seat": str(folder / "things.json")}


def _library(folder: Path) -> dict[str, Any]:
    """Documents of two subjects, and recorded answers about one."""
    texts = [
        f"Part {i}: {w} and more." for i, w in enumerate(["lamp light", "fresnel lens", "prism beam", "yeast dough", "oven crust"] * 3)
    ]
    said = {"Questions about: lamp": "Who built a lens?\n", "Thoughts about: Who built a lens?": "Fresnel set each prism in one beam."}
    recorded = write_jsonl(folder / "recorded.jsonl", ({"prompt": p, "answer": a} for p, a in said.items()))
    return {"data": write_jsonl(folder / "d.jsonl", ({"text": t} for t in texts)), "recorded": recorded, "seeds": ["lamp"], "rounds": 1}


def _graded(folder: Path) -> dict[str, Any]:
    """Sentences and rows of signs, labelled good and bad."""
    rows = [{"text": f"The {w} was drawn with care, and it is in the book." if k else f"{w} >>> {w}!!! 1{w}", "label": k}
            for w in WORDS for k in (0, 1)]  # fmt: skip
    return dict.fromkeys(("data", "labelled"), write_jsonl(folder / "graded.jsonl", rows))


ROWS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "text": _text,
    "tokens": _tokens,
    "chats": _chats,
    "domains": _domains,
    "fact": _fact,
    "matrix": _matrix,
    "chains": _chains,
    "pairs": _pairs,
    "judged": _judged,
    "losses": _losses,
    "days": _days,
    "pages": _pages,
    "functions": _functions,
    "answers": _answers,
    "traces": _traces,
    "recorded": _recorded,
    "questions": _questions,
    "entities": _entities,
    "plugged": _plugged,
    "lessons": _lessons,
    "people": _people,
    "languages": _languages,
    "library": _library,
    "graded": _graded,
}
