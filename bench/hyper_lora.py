"""What two rewritten layers cost: HyperMoE's adapters by expert set, LoRAMoE's adapters as one low-rank product.

Forward and backward, fp32, one thread, process CPU time, forms interleaved; ratios are medians over rounds. Bytes are what
autograd keeps, weights left out. Every form is checked against the published one first.

    python bench/hyper_lora.py [--rounds 9]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import save
from modelwright.moe.hyper import HyperNetwork, SetCode, adapt
from modelwright.moe.lora import LoraMoeLinear


def per_token(x: Tensor, index: Tensor, code: SetCode, hyper: HyperNetwork) -> Tensor:
    """HyperMoE as published: a generated adapter for every token."""
    made = hyper.adapters(hyper.codes(code(index), 0))
    h = F.relu(torch.einsum("td,tda->ta", x, made.down) + made.down_bias)
    return torch.einsum("ta,tad->td", h, made.up) + made.up_bias


def loop(layer: LoraMoeLinear, x: Tensor) -> Tensor:
    """LoRAMoE as published: one adapter after another."""
    w, r, out = layer.gate(x), layer.r, F.linear(x, layer.weight)
    for n in range(layer.experts):
        s = slice(n * r, (n + 1) * r)
        out = out + w[:, n, None] * F.linear(F.linear(x, layer.lora_A[s]), layer.lora_B[:, s]) * layer.scale
    return out


def kept(run: Callable[[], Tensor], weights: list[Tensor]) -> int:
    """Bytes kept for the backward pass."""
    known, found = {w.untyped_storage().data_ptr() for w in weights}, {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in known:
            found[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(found.values())


def measure(what: str, forms: dict[str, tuple[Callable[[], Tensor], list[Tensor]]], base: str, rounds: int) -> list[list[str]]:
    times: dict[str, list[float]] = {n: [] for n in forms}
    gradient = torch.randn(1024, 1024)
    for r in range(rounds + 1):
        for name, (run, leaves) in forms.items():
            start = time.process_time()
            y = run()
            torch.autograd.grad(y, leaves, gradient[: len(y), : y.shape[1]])
            if r:
                times[name].append(time.process_time() - start)
    rows = []
    for name, (run, leaves) in forms.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
        rows.append([what, name, f"{1e3 * statistics.median(times[name]):.1f}", f"{ratio:.3f}", f"{kept(run, leaves) / 1e6:.1f}"])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=9)
    rounds = arguments.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    T, d, E = 512, 256, 8
    code, hyper, x = SetCode(E), HyperNetwork(d, 1), torch.randn(T, d, requires_grad=True)
    rows = []
    for k in (1, 2):
        index = torch.rand(T, E).topk(k).indices
        leaves: list[Tensor] = [x, *code.parameters(), *(p for n, p in hyper.named_parameters())]
        run = {"one adapter per token": lambda i=index: per_token(x, i, code, hyper), "ours": lambda i=index: adapt(x, i, code, hyper, 0)}
        torch.testing.assert_close(run["ours"](), run["one adapter per token"](), rtol=1e-4, atol=1e-5)
        rows += measure(f"HyperMoE top-{k}, T=512, d=256", {n: (f, leaves) for n, f in run.items()}, "one adapter per token", rounds)
    layer = LoraMoeLinear(512, 1024, False, experts=8, r=4, alpha=32.0)
    nn.init.normal_(layer.lora_B, std=0.05)
    layer.weight.requires_grad_(False)
    x = torch.randn(1024, 512, requires_grad=True)
    torch.testing.assert_close(layer(x), loop(layer, x), rtol=1e-4, atol=1e-4)
    own = [x, layer.lora_A, layer.lora_B, layer.lora_route]
    lora = measure(
        "LoRAMoE N=8, r=4, T=1024, 512 to 1024",
        {
            "frozen linear": (lambda: F.linear(x, layer.weight), [x]),
            "loop over experts": (lambda: loop(layer, x), own),
            "ours": (lambda: layer(x), own),
        },
        "frozen linear",
        rounds,
    )
    one, two = (1 / float(r[3]) for r in rows if r[1] == "ours")
    save(
        "hyper_lora",
        claim="HyperMoE (top-1, 512 tokens, width 256) is at least 10 times faster than with an adapter per token, and LoRAMoE (8 experts "
        "of rank 4) costs at most 1.5 times the frozen linear layer, forward and backward.",
        outcome=f"HyperMoE {one:.1f} times faster at top-1, {two:.1f} at top-2; LoRAMoE {float(lora[2][3]):.2f} times the frozen linear, "
        f"the published loop {float(lora[1][3]):.2f} times.",
        columns=["layer", "form", "CPU ms", "time / first form", "MB kept for backward"],
        rows=rows + lora,
        seeds=[0],
        notes=[f"{rounds} rounds, interleaved, one thread, process CPU time; the paper's sizes a=64, b=e=q=128, c=10."],
    )


if __name__ == "__main__":
    main()
