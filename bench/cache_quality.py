"""What is lost when a cache is evicted: NACL, its two halves alone and the baselines, at equal budgets.

On tasks made on the spot with small models trained for them here (minutes, one per seed), the question read before or after
the eviction; and on real text with a really trained model: the loss of what really comes next.
"""

import argparse
import statistics
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import SHARED, Cache, save
from modelwright.cache.engine.measure import continued
from modelwright.cache.engine.suite import TASKS, make, solve
from modelwright.cache.evictors.names import named
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.numbers.stats import bootstrap_mean, wilson

SYMBOLS, LENGTH, TEXT, CONTEXT, GOES_ON = torch.arange(4, 132), 128, 64, 384, 97
SHORT = {"observe": 8, "kernel": 3}  # the windows of the papers are as long as these prompts
ARMS = {
    "full cache": None,
    "NACL": ("nacl", {}),
    "NACL, proxies alone": ("nacl", {"random": 0}),
    "NACL, chance alone": ("nacl", {"random": 1, "protect": 0}),
    "SnapKV": ("snapkv", SHORT),
    "PyramidKV": ("pyramidkv", SHORT),
    "H2O": ("h2o", {}),
    "TOVA": ("tova", {}),
    "StreamingLLM": ("streaming_llm", {}),
    "key norm": ("key_norm", {}),
    "random": ("random", {}),
}
KEEP = (0.5, 0.2, 0.1)


def train(seed: int, steps: int, file: Path) -> LlamaForCausalLM:
    """A three-layer model: repeated noise first, from which looking back is learnt, then the tasks at growing length."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 132, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False))
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    optimizer, first = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.98)), 400
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 50, (steps - step) / (0.4 * steps))
        if step < first or step % 5 == 0:
            n = int(torch.randint(8, 20 if step < first else 64, (1,)))
            ids = torch.randint(4, 132, (64 if step < first else 16, n)).repeat(1, 2)
            learnt = torch.arange(2 * n) > n
        else:
            length = int(24 + (LENGTH - 24) * min(1, (step - first) / (0.6 * (steps - first))))
            task = TASKS[step % 5 - 1]
            asked = 1 if task in ("passkey", "copy") else 8
            ids, learnt = make(task, max(16, 2048 // length), length, SYMBOLS, 1_000_003 * (seed + 1) + step, asked).rows()
        loss = model(ids, labels=torch.where(learnt, ids, -100), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.save(model.state_dict(), file)
    return model.eval()


def text_rows() -> torch.Tensor:
    source = Checkpoint(SHARED / "stories260K" / "hf")
    words = (SHARED / "grimm" / "GrimmsFairyTales.txt").read_text(encoding="utf-8")
    ids = torch.tensor(source.tokenizer()(words, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // (CONTEXT + GOES_ON) * (CONTEXT + GOES_ON)].view(-1, CONTEXT + GOES_ON)
    return rows[torch.linspace(0, len(rows) - 1, TEXT).long()]


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args.add_argument("--steps", type=int, default=2400)
    args.add_argument("--items", type=int, default=64)
    a = args.parse_args()
    torch.set_num_threads(1)
    silence_transformers()
    known = Cache("cache-quality")
    stories, rows_of_text = Checkpoint(SHARED / "stories260K" / "hf").model().eval(), text_rows()
    solved: dict = {}
    rise: dict = {}
    for seed in a.seeds:
        model = train(seed, a.steps, known.file.with_name(f"modelwright-cache-quality-{a.steps}-{seed}.pt"))
        full = None
        for arm, given in ARMS.items():
            for keep in KEEP if given else (1.0,):
                method = named(given[0], keep, None, given[1], seed) if given else None
                for task in TASKS:
                    for after in (False, True):

                        def right(task=task, method=method, after=after, seed=seed, model=model) -> int:
                            items = make(task, a.items, LENGTH, SYMBOLS, 77 + seed)
                            return int(solve(model, items, method, after=after, batch=64).sum())

                        hits = known([seed, a.steps, a.items, arm, keep, task, after], right)
                        solved.setdefault((arm, keep, task, after), []).append(hits)

                def loss(method=method) -> list[float]:
                    return continued(stories, rows_of_text, CONTEXT, method, 16).nll.mean(1).tolist()

                draws = seed if given and given[0] in ("nacl", "random") else 0
                found = torch.tensor(known(["text", arm, keep, draws, TEXT], loss))
                full = found if method is None else full
                rise.setdefault((arm, keep), []).append((found - full).tolist())

    n = a.items * len(a.seeds)

    def share(arm: str, keep: float, task: str, after: bool) -> str:
        hits = sum(solved[arm, keep, task, after])
        low, high = wilson(hits, n)
        return f"{hits / n:.0%} ({low:.0%} to {high:.0%})"

    asked = {
        False: TASKS[1:],
        True: TASKS,
    }  # the first token of an answer comes from the prompt's reading: recall, if asked before, is free
    rows, mean = [], {}
    for arm, keep in rise:
        per_row = torch.tensor(rise[arm, keep]).mean(0).numpy()  # over seeds
        low, high = bootstrap_mean(per_row)
        for after, tasks in asked.items():
            mean[arm, keep, after] = statistics.mean(sum(solved[arm, keep, t, after]) / n for t in tasks)
        cells = [share(arm, keep, t, after) for after, tasks in asked.items() for t in tasks]
        cells.insert(3, f"{mean[arm, keep, True]:.0%}")
        rows.append([arm, f"{keep:.0%}", f"{mean[arm, keep, False]:.0%}", *cells, f"{per_row.mean():+.4f} ({low:+.4f} to {high:+.4f})"])
    some = [x for x in ARMS if ARMS[x]]
    order = {(k, after): sorted(some, key=lambda x: -mean[x, k, after]) for k in KEEP for after in asked}
    text = {k: sorted(some, key=lambda x: statistics.mean(map(statistics.mean, rise[x, k]))) for k in KEEP}

    def places(found: dict) -> str:
        return "; ".join(f"{k:.0%} kept: {f[0]} first, NACL {f.index('NACL') + 1} of {len(f)}" for k, f in found.items())

    save(
        "cache_quality",
        claim="At equal budgets NACL keeps more than its two halves alone and than the baselines; retrieval collapses at small budgets",
        outcome=f"Tasks asked before eviction: {places({k: order[k, False] for k in KEEP})}. "
        f"Asked after: {places({k: order[k, True] for k in KEEP})}. "
        f"Real text: {places(text)}. At 20 % kept, asked before: "
        + ", ".join(f"{x} {mean[x, 0.2, False]:.0%}" for x in list(ARMS)[1:4])
        + f"; retrieval with NACL {share('NACL', 0.2, 'retrieval', False)}, asked after {share('NACL', 0.2, 'retrieval', True)}, "
        f"with the full cache {share('full cache', 1.0, 'retrieval', False)}.",
        columns=["cache", "kept", "asked before: mean", *TASKS[1:], "asked after: mean", *TASKS, "rise of the loss on real text"],
        rows=rows,
        seeds=a.seeds,
        notes=[
            f"whole answers over {len(a.seeds)} seeds (model, items and draws) x {a.items} items, 95 % by Wilson; prompts of {LENGTH} "
            "tokens; three-layer models of width 64 trained here",
            f"the loss, in nats per token, of {GOES_ON - 1} tokens after {CONTEXT}: {TEXT} passages of Grimm's tales, stories260K; "
            "mean over draws where a method draws, bootstrap over passages",
            f"SnapKV and PyramidKV with {SHORT}, because their papers' 32 tokens are more than these budgets; all else as by default",
            "asked after: the context is evicted before the question is seen, so nothing can choose what the answer needs; asked before, "
            "the first token of an answer comes from the full reading of the prompt, so recall, whose answer is one token, is left out",
        ],
        plots=[
            {
                "kind": "line",
                "title": "Made tasks, question before eviction",
                "x": "% kept",
                "y": "mean share of whole answers",
                "series": {
                    x: [[100 * k, mean[x, k, False]] for k in sorted(KEEP)] + [[100, mean["full cache", 1.0, False]]]
                    for x in ARMS
                    if ARMS[x]
                },
            }
        ],
    )


if __name__ == "__main__":
    main()
