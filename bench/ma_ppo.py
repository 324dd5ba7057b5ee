"""MA-RLHF (arXiv 2410.02743): macro actions reach a level of reward in fewer updates where a long response is rewarded at its end.

A small Llama over 8 words writes 64 tokens. The reward, paid at the end, is 4 times the share of word 3 among the first 32. Beside n = 5
and n = 10 stand plain PPO (n = 1) and the control: plain PPO whose lambda is 0.95^(1/5), so that credit reaches as far as with n = 5.
Then the cost: CPU time of whole updates in the one training loop, against a plain loop of the same parts.
"""

import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
import transformers

from common import Cache, save, spread
from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.knobs import Train
from modelwright.core.train.loop import fit
from modelwright.rl.macro import segments
from modelwright.rl.ppo import Knobs, Ppo
from modelwright.rl.rollout.experience import kl_of, logp_of
from modelwright.rl.rollout.objective import policy_losses, value_losses

SEEDS, UPDATES, LENGTH, BATCH, LEVEL = [0, 1, 2, 3], 20, 64, 64, 1.0
VARIANTS: dict[str, dict[str, Any]] = {
    "n = 1": {"segmenter": "token"},
    "n = 1, lambda = 0.95^(1/5)": {"segmenter": "token", "lam": 0.95**0.2},
    "n = 5": {"n": 5},
    "n = 10": {"n": 10},
}


def worth(completion_ids: list[list[int]]) -> list[float]:
    return [4 * sum(t == 3 for t in ids[:32]) / 32 for ids in completion_ids]


def model_of(seed: int, hidden: int = 48, layers: int = 1, vocab: int = 8) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def prompts(n: int) -> Rows:
    ids = torch.ones(n, 2, dtype=torch.int32)
    return Rows(ids, torch.full_like(ids, IGNORE), torch.full((n,), 2))


def technique(**knobs: Any) -> Ppo:
    usual = {"reward_function": "bench_reward:worth", "response_tokens": LENGTH, "temperature": 1.0, "top_k": 0, "reward_clip": 0.0}
    return Ppo(Knobs(**{**usual, "kl": 0.02, "ppo_epochs": 2, **knobs}))


def trained(method: Ppo, model: Any, seed: int, updates: int, batch: int, lr: float) -> None:
    rows, train = prompts(batch), Train(batch=batch, lr=lr, schedule="constant", warmup=0.0, record=False, save_every=10**6)
    settings = method.settings(rows, Train(**{**vars(train), "epochs": float(updates)}))
    fit(model, rows, settings, techniques=[method], evals={}, folder=Path(tempfile.mkdtemp()), seed=seed)


def rewards(variant: str, seed: int) -> list[float]:
    method = technique(**VARIANTS[variant])
    trained(method, model_of(seed), seed, UPDATES, BATCH, 3e-3)
    return [h["score"] for h in method.history.updates]


# ---- the cost ----------------------------------------------------------------------------------------------------------
def plain_updates(model: Any, count: int, batch: int) -> None:
    """The same parts by hand: generate, three passes without a gradient, estimates, two steps with one."""
    reference, critic = model_like(model), model_like(model)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    both = [*model.parameters(), *critic.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(both, lr=1e-5)
    start = torch.ones(batch, 2, dtype=torch.long)
    for _ in range(count):
        model.eval()
        with torch.no_grad():
            ids = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=LENGTH)
            old, ref = logp_of(model(ids).logits, ids)[:, 1:], logp_of(reference(ids).logits, ids)[:, 1:]
            before = head(critic.base_model(ids)[0])[:, 1:-1, 0]
            rewards = -0.02 * kl_of(old, ref, "k1")
            rewards[:, -1] += torch.tensor(worth(ids[:, 2:].tolist()))
            gains = segments.advantages(rewards, before, 1.0, 0.95)
        model.train()
        for _ in range(2):
            policy = policy_losses(logp_of(model(ids).logits, ids)[:, 1:], old, gains, 0.2).mean()
            value = value_losses(head(critic.base_model(ids)[0])[:, 1:-1, 0], before, gains + before, 0.2).mean()
            (policy + value).backward()
            torch.nn.utils.clip_grad_norm_(both, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def model_like(model: Any) -> Any:
    other = transformers.LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def cost(repeat: int) -> list[float]:
    """Seconds of CPU for one update: the plain loop, ours with n = 1, ours with n = 5. What starts a run is taken off by a shorter run."""
    sizes = {"hidden": 192, "layers": 4, "vocab": 512}

    def clocked(work: Any, count: int) -> float:
        model = model_of(repeat, **sizes)
        began = time.process_time()
        work(model, count)
        return time.process_time() - began

    ways = [
        lambda m, c: plain_updates(m, c, 16),
        lambda m, c: trained(technique(segmenter="token"), m, 0, c, 16, 1e-5),
        lambda m, c: trained(technique(n=5), m, 0, c, 16, 1e-5),
    ]
    return [(clocked(w, 4) - clocked(w, 1)) / 3 for w in ways]


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    module = types.ModuleType("bench_reward")
    module.worth = worth  # type: ignore[attr-defined]
    sys.modules["bench_reward"] = module
    cache = Cache("ma_ppo")
    found = {v: [cache([v, s], lambda v=v, s=s: rewards(v, s)) for s in SEEDS] for v in VARIANTS}
    rows = []
    for name, runs in found.items():
        reached = [next((i + 1 for i, r in enumerate(run) if r >= LEVEL), UPDATES + 1) for run in runs]
        shown = ", ".join(str(n) if n <= UPDATES else f"more than {UPDATES}" for n in reached)
        rows.append([name, shown, spread([run[9] for run in runs]), spread([run[-1] for run in runs])])
    costs = [cache(["cost", i], lambda i=i: cost(i)) for i in range(3)]
    ratios = {k: spread([c[i] / c[0] for c in costs]) for i, k in ((1, "n = 1"), (2, "n = 5"))}
    last = {name: sum(run[-1] for run in runs) / len(runs) for name, runs in found.items()}
    save(
        "ma_ppo",
        claim="where a long response is rewarded at its end, macro actions reach a level of reward in fewer updates than plain PPO",
        outcome=f"mean reward after {UPDATES} updates: " + "; ".join(f"{k}: {v:.2f}" for k, v in last.items()),
        columns=["variant", f"updates to reward {LEVEL:g}, by seed", "reward at update 10", f"reward at update {UPDATES}"],
        rows=rows,
        seeds=SEEDS,
        notes=[
            f"CPU time of an update against a plain loop of the same parts: {ratios['n = 1']} with n = 1, {ratios['n = 5']} with n = 5",
            "a Llama of one layer, 8 words, 64 tokens a response, 64 responses and 2 passes an update, learning rate 3e-3, KL weight 0.02",
        ],
        plots=[
            {
                "kind": "line",
                "title": "Mean reward",
                "x": "update",
                "y": "reward",
                "series": {k: [[i + 1, sum(r[i] for r in runs) / len(runs)] for i in range(UPDATES)] for k, runs in found.items()},
            }
        ],
    )


if __name__ == "__main__":
    main()
