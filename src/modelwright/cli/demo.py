"""`modelwright demo`: a dense checkpoint becomes a working mixture of experts, with the proof and the control beside it.

base -> upcycle (logits unchanged) -> tune on text the base has not seen; and the dense base tuned on the same tokens, which
is what the mixture has to beat. Old text is a held-out share of the seedling's own diet, or, for another base, samples
drawn from it.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from modelwright.cli.output import free_folder
from modelwright.core.data.make import tokenize
from modelwright.core.data.read import read
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, number
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.model.lineage import versions
from modelwright.core.report.page import Report, Section
from modelwright.core.report.plots import number as short
from modelwright.core.report.progress import choose
from modelwright.core.train.evaluate import evaluate_rows
from modelwright.moe.load import expert_load, max_violation
from modelwright.runner.recipe import parse
from modelwright.runner.run import run_recipe

UNSEEN = ["asyncio", "email", "http", "json", "logging", "unittest", "urllib", "xml"]  # as in the seedling's recipe
EXPERTS, TOP_K, CONTEXT, LR = 8, 2, 256, 2e-3
_EVAL_ROWS = 16


def run_demo(
    *, base: str = "seedling", data: str | None = None, to: str = "out/demo", tokens: str = "300k", seed: int = 0, as_json: bool = False
) -> dict[str, Any]:
    """Run the whole job; writes `to`/moe, `to`/dense, `to`/report.html and prints the table. Returns the numbers."""
    progress = choose(as_json)
    silence_transformers()
    try:
        budget = int(number(tokens))
    except ValueError:
        raise UserError(f"tokens={tokens!r} does not fit", "it must be a whole number", "write 300k") from None
    source = Checkpoint(base)
    folder = free_folder(Path(to))
    folder.mkdir(parents=True)
    context = min(CONTEXT, int(source.hf_config.max_position_embeddings))
    with progress.task("texts"):
        texts = _texts(source, base, data, folder, context, seed)
    steps = -(-budget // (8 * context))
    train = {
        "tokens": budget,
        "eval_every": max(1, steps // 6),
        "save_every": max(50, steps // 2),
        "lr": LR if base == "seedling" else LR / 4,
        "context": context,
        "batch": 8,
        "record": True,
    }
    tune = {
        "tune.full": {
            "data": {"path": str(texts["train"]), "column": "text"},
            "train": train,
            "evals": {n: {"path": str(texts[n]), "column": "text"} for n in ("new", "old")},
        }
    }
    up = {"reshape.upcycle": {"experts": EXPERTS, "top_k": TOP_K}}
    arms = {}
    for arm, recipe in (("moe", [up, tune]), ("dense", [tune])):
        raw = {"name": f"demo-{arm}", "seed": seed, "base": base, "steps": recipe, "save": {"to": str(folder / arm)}}
        arms[arm] = run_recipe(parse(raw), progress)
    with progress.task("expert load"):
        load = _load(folder / "moe", texts["new"], context)
    numbers = _numbers(arms, load) | {"to": str(folder), "report": str(folder / "report.html"), "tokens": budget, "seed": seed}
    report = _report(base, data, numbers, arms, load, _samples(source, folder, texts["new"], seed))
    (folder / "report.html").write_text(report.html(), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(numbers, indent=1))
    if as_json:
        print(json.dumps(numbers, indent=1))
    else:
        report.print()
        print(f"\nreport  {folder / 'report.html'}\nmodels  {folder / 'moe'}  {folder / 'dense'}")
    return numbers


def _texts(source: Checkpoint, base: str, data: str | None, folder: Path, context: int, seed: int) -> dict[str, Path]:
    """jsonl files: train, new (held out) and old."""
    from modelwright.curate.stdlib import Knobs, stdlib

    out = {n: folder / f"text-{n}.jsonl" for n in ("train", "new", "old")}
    if data:
        documents = [d for d in read(Data(path=data)) if isinstance(d, str)]
        if not documents:
            raise UserError(f"{data} holds no text", "the demo learns plain text", "give a text file or a column of text")
        whole = "\n\n".join(documents)
        at = int(len(whole) * 0.95)
        _jsonl(out["train"], [whole[:at]])
        _jsonl(out["new"], [whole[at:]])
    else:
        stdlib(Knobs(parts=["unicode"], share="train"), folder)
        os.rename(folder / "dataset.jsonl", out["train"])
        stdlib(Knobs(parts=["unicode"], share="heldout"), folder)
        os.rename(folder / "dataset.jsonl", out["new"])
    if base == "seedling":
        stdlib(Knobs(skip=UNSEEN, share="heldout"), folder)
        os.rename(folder / "dataset.jsonl", out["old"])
    else:
        _jsonl(out["old"], _drawn(source, context, seed))
    for name in ("new", "old"):  # a fixed small slice, evenly spread
        rows = [json.loads(line)["text"] for line in out[name].read_text().splitlines()]
        limit = _EVAL_ROWS * context * 4
        step = max(1, sum(map(len, rows)) // limit)
        _jsonl(
            out[name],
            ["".join(rows)[i : i + limit // _EVAL_ROWS] for i in range(0, sum(map(len, rows)), step * limit // _EVAL_ROWS)][:_EVAL_ROWS],
        )
    return out


def _jsonl(file: Path, rows: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": r}) + "\n" for r in rows), encoding="utf-8")


@torch.no_grad()
def _drawn(source: Checkpoint, context: int, seed: int) -> list[str]:
    """Samples of the base at temperature 1: what it knows, when its diet is not at hand."""
    tokenizer, model = source.tokenizer(), source.model(torch.float32)
    if tokenizer is None:
        raise UserError(f"{source.folder} has no tokenizer", "the demo works on text", "add the tokenizer files")
    start = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    torch.manual_seed(seed)
    ids = model.generate(
        torch.full((_EVAL_ROWS, 1), start), do_sample=True, top_k=0, temperature=1.0, max_new_tokens=context - 1, pad_token_id=start
    )
    return [t for t in tokenizer.batch_decode(ids, skip_special_tokens=True) if t.strip()]


def _load(folder: Path, file: Path, context: int) -> dict[str, Any]:
    after = Checkpoint(folder)
    model, tokenizer = after.model(torch.float32), after.tokenizer()
    rows = tokenize(read(Data(path=str(file), column="text")), tokenizer, len(tokenizer), context)
    share = expert_load(model, rows)
    return {"share": share.tolist(), "max_violation": max_violation(share).tolist(), "check": evaluate_rows(model, rows, 8)}


def _samples(source: Checkpoint, folder: Path, file: Path, seed: int) -> list[list[str]]:
    """What each model writes after the same words of the new text."""
    passage = json.loads(file.read_text().splitlines()[_EVAL_ROWS // 2])["text"]
    prompt = passage[passage.find("\n") + 1 :][:200]
    prompt = prompt[: prompt.rfind("\n") + 1] or prompt
    rows = []
    for name, ckpt in (
        ("dense base", source),
        ("mixture, tuned", Checkpoint(folder / "moe")),
        ("dense, tuned (control)", Checkpoint(folder / "dense")),
    ):
        tokenizer, model = ckpt.tokenizer(), ckpt.model(torch.float32)
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48, pad_token_id=0)
        rows.append([name, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)])
    return [["the text so far", prompt], *rows]


def _numbers(arms: dict[str, Any], load: dict[str, Any]) -> dict[str, Any]:
    key = "bits_per_byte"
    found: dict[str, Any] = {}
    for arm, result in arms.items():
        entry = result.steps[-1]
        c = entry["certificate"]
        found[arm] = {
            "params_total": c["params_total"],
            "params_active": c["params_active"],
            "flops_per_token": c["flops_per_token"],
            "seconds": entry["seconds"],
            "loads_in": c["loads_in"],
        }
        for name in ("new", "old"):
            curve = [e[key] for e in entry["evals"] if e["name"] == name]
            found[arm] |= {f"{name}_before": curve[0], f"{name}_after": curve[-1]}
    found["certificate"] = arms["moe"].steps[0]["certificate"]
    found["expert_load"] = load
    return found


def _report(base: str, data: str | None, n: dict[str, Any], arms: dict[str, Any], load: dict[str, Any], samples: list[list[str]]) -> Report:
    report = Report("From one dense model to a mixture of experts")
    report.lead = (
        f"{base} was copied into {EXPERTS} experts per layer, {TOP_K} active per token, and tuned on {short(n['tokens'])} tokens of "
        f"{'your text' if data else 'the names of Unicode characters, which it had not seen'}. "
        "The dense model, tuned on the same tokens, is the control."
    )
    written = {"title": "Samples", "columns": ["", ""], "rows": samples, "prose": True}
    report.sections += [
        Section(
            "What happened",
            _verdict(n),
            _tiles(n),
            [_comparison(n)],
            [_curve(arms, "new", "New text while tuning"), _curve(arms, "old", "Old text while tuning")],
        ),
        _expert_load(load),
        Section("What they write", "The same beginning, continued greedily.", tables=[written]),
    ]
    for entry in arms["moe"].steps:
        report.step({k: v for k, v in entry.items() if k != "evals"})
    report.facts = {"base": base, "seed": n["seed"], "tokens": n["tokens"], **versions()}
    return report


def _verdict(n: dict[str, Any]) -> str:
    moe, dense = n["moe"], n["dense"]
    gain, lost = dense["new_after"] - moe["new_after"], moe["old_after"] - moe["old_before"]
    return (
        f"On the new text the mixture ends {abs(gain):.3f} bits per byte {'below' if gain > 0 else 'above'} the control, at "
        f"{moe['flops_per_token'] / dense['flops_per_token']:.2f} times its FLOPs per token. "
        f"On the old text it {'lost' if lost > 0 else 'gained'} {abs(lost):.3f}. One seed, one small budget: a demonstration, not evidence."
    )


def _tiles(n: dict[str, Any]) -> list[tuple[str, str, str]]:
    c, moe = n["certificate"], n["moe"]
    gap = f"{c['max_abs_dlogit']:.0e}" if c["max_abs_dlogit"] is not None else "not compared"
    sizes = f"{short(moe['params_total'])} / {short(moe['params_active'])}"
    return [
        (f"{moe['new_before']:.3f} → {moe['new_after']:.3f}", "bits per byte, new text", "mixture, before and after tuning"),
        (f"{moe['old_before']:.3f} → {moe['old_after']:.3f}", "bits per byte, old text", "what tuning cost"),
        (gap, "largest logit difference at step 0", "nothing was lost by the copy"),
        (sizes, "parameters, total / active", f"from {short(c['before']['params_total'])}"),
    ]


def _comparison(n: dict[str, Any]) -> dict[str, Any]:
    before, moe, dense = n["certificate"]["before"], n["moe"], n["dense"]
    return {
        "title": "Bits per byte (lower is better)",
        "columns": ["", "new text", "old text", "parameters", "active", "FLOPs per token"],
        "rows": [
            ["dense base", f"{dense['new_before']:.3f}", f"{dense['old_before']:.3f}", *_sizes(before)],
            ["mixture, step 0", f"{moe['new_before']:.3f}", f"{moe['old_before']:.3f}", *_sizes(moe)],
            ["mixture, tuned", f"{moe['new_after']:.3f}", f"{moe['old_after']:.3f}", *_sizes(moe)],
            ["dense, tuned (control)", f"{dense['new_after']:.3f}", f"{dense['old_after']:.3f}", *_sizes(dense)],
        ],
    }


def _expert_load(load: dict[str, Any]) -> Section:
    experts = [str(i) for i in range(len(load["share"][0]))]
    return Section(
        "Who does the work",
        f"Share of the routed tokens of the new text that each expert gets after tuning; {1 / len(experts):.3f} would be even. "
        f"The busiest expert of any layer carries {max(load['max_violation']) + 1:.2f} times the mean.",
        plots=[
            {
                "kind": "heat",
                "title": "Expert load by layer",
                "x": "expert",
                "y": "layer",
                "columns": experts,
                "rows": [str(i) for i in range(len(load["share"]))],
                "values": load["share"],
            },
            {
                "kind": "bars",
                "title": "Expert load, mean over layers",
                "x": "expert",
                "y": "share of routed tokens",
                "groups": experts,
                "series": {"load": torch.tensor(load["share"]).mean(0).tolist()},
                "line": {"at": 1 / len(experts), "name": "even"},
            },
        ],
    )


def _sizes(s: dict[str, Any]) -> list[str]:
    return [short(s["params_total"]), short(s["params_active"]), short(s["flops_per_token"])]


def _curve(arms: dict[str, Any], name: str, title: str) -> dict[str, Any]:
    series = {
        label: [[e["step"], e["bits_per_byte"]] for e in arms[arm].steps[-1]["evals"] if e["name"] == name]
        for label, arm in (("mixture", "moe"), ("dense (control)", "dense"))
    }
    return {"kind": "line", "title": title, "x": "step", "y": "bits per byte", "series": series}
