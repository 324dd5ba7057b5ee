"""A layer's and a model's experts over several processes, for test_parallel.py, under torchrun: python expert_ranks.py FOLDER PROCESSES."""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.train import dist
from modelwright.moe import parallel
from modelwright.moe.parallel import execute_over, rectify_over, share
from modelwright.moe.reroute import rerouted
from modelwright.moe.routing import Routing, score, select

E, D, WIDTH = 8, 8, 12
NAMES = ("x", "router", "gate_up", "down")


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = (20, 20)  # tokens of each process of a group
    k: int = 2
    options: dict[str, Any] = field(default_factory=lambda: {"factor": 0.8})  # of rectify; empty: plain choice of k
    identical: bool = False
    padded: bool = False
    dtype: torch.dtype = torch.float64


CASES = {
    "even": Case(),
    "fp32": Case(dtype=torch.float32),
    "one choice": Case(k=1),
    "drop": Case(options={"factor": 0.5, "fill_in": False, "intra": False}),
    "fill in alone": Case(options={"factor": 0.8, "intra": False}),
    "intra alone": Case(options={"factor": 0.3, "fill_in": False}),
    "any": Case(options={"factor": 0.5, "unrouted": "any", "fill_order": "code"}),
    "uneven": Case(sizes=(29, 11)),
    "uneven drop": Case(sizes=(11, 29), options={"factor": 0.5, "intra": False}),
    "padded": Case(sizes=(24, 20), padded=True),
    "none on one": Case(sizes=(0, 24)),
    "none anywhere": Case(sizes=(0, 0)),
    "enough": Case(sizes=(22, 18), options={"factor": math.inf, "fill_in": False}),
    "plain": Case(sizes=(22, 18), options={}),
    "plain fp32": Case(sizes=(22, 18), options={}, dtype=torch.float32),
    **{f"identical {f} {k}": Case((25, 15), k, {"factor": f}, identical=True) for f in (0.1, 0.5) for k in (1, 2)},
}


def data(case: Case, group: int) -> dict[str, Tensor]:
    """All tokens of a group of processes, and the layer, which is the same in all groups."""
    draw, layer = torch.Generator().manual_seed(7 + group), torch.Generator().manual_seed(3)
    T = sum(case.sizes)
    x, v = (torch.randn(T, D, generator=draw, dtype=case.dtype) for _ in range(2))
    made = {
        "router": torch.randn(E, D, generator=layer, dtype=case.dtype) + torch.linspace(0, 1, E)[:, None].to(case.dtype),
        "gate_up": torch.randn(E, 2 * WIDTH, D, generator=layer, dtype=case.dtype) * 0.5,
        "down": torch.randn(E, D, WIDTH, generator=layer, dtype=case.dtype) * 0.5,
    }
    if case.identical:
        made |= {n: made[n][:1].expand_as(made[n]).clone() for n in ("gate_up", "down")}
    return made | {"x": x, "v": v, "real": torch.rand(T, generator=draw) < (0.7 if case.padded else 2)}


def route(case: Case, x: Tensor, router: Tensor, real: Tensor | None, rectify: Any) -> Routing:
    logits, probs = score(x, router)
    if not case.options:
        return Routing.of(logits, probs, *select(probs, case.k))
    return rectify(logits, case.k, real=real, **case.options)


def one(case: Case, group: Any, which: int) -> dict[str, Any]:
    """This process's part of a case: output, gradients, routing, and how many rows it sent to each process."""
    rank, sent = torch.distributed.get_rank(group), []
    made = data(case, which)
    mine = {n: made[n].split(case.sizes)[rank].clone() for n in ("x", "v", "real")}
    x, router = mine["x"].requires_grad_(), made["router"].requires_grad_()
    gate_up, down = (share(made[n], group).clone().requires_grad_() for n in ("gate_up", "down"))
    routing = route(case, x, router, mine["real"] if case.padded else None, lambda *a, **o: rectify_over(*a, group=group, **o))
    send = torch.distributed.all_to_all_single

    def watched(out: Tensor, rows: Tensor, take: list[int], give: list[int], **k: Any) -> None:
        if rows.is_floating_point():
            sent.append(list(give))
        send(out, rows, take, give, **k)

    with mock.patch("torch.distributed.all_to_all_single", watched):
        y = execute_over(x, routing, gate_up, down, group=group)
    grads = torch.autograd.grad((y * mine["v"]).sum(), (x, router, gate_up, down))
    return {
        "y": y.detach(),
        **{f"d {n}": g for n, g in zip(NAMES, grads, strict=True)},
        **{n: getattr(routing, n).detach() for n in ("token", "expert", "source", "weight", "probs")},
        "asked": routing.num_assignments,
        "sent": sent[0],
    }


@dataclass(frozen=True)
class Stock:
    family: str
    processes: int = 2
    options: dict[str, Any] = field(default_factory=dict)  # of rectify; empty: as the router has it
    recomputed: bool = False


STOCK = {
    "mixtral": Stock("mixtral"),
    "mixtral rectified": Stock("mixtral", options={"factor": 0.5}),
    "mixtral rectified by four": Stock("mixtral", 4, {"factor": 0.7}),
    "qwen3_moe by four": Stock("qwen3_moe", 4),
    "qwen3_moe rectified recomputed": Stock("qwen3_moe", options={"factor": 0.5}, recomputed=True),
    "granitemoe recomputed": Stock("granitemoe", recomputed=True),
    "granitemoe rectified": Stock("granitemoe", options={"factor": 0.5}),
    "qwen2_moe": Stock("qwen2_moe"),
    "olmoe dropped": Stock("olmoe", options={"factor": 0.5, "fill_in": False, "intra": False}),
}
ROWS = 2  # of each process


def batch(stock: Stock) -> dict[str, Tensor]:
    """Padded rows of all processes; those of the first process are shorter."""
    draw, n = torch.Generator().manual_seed(5), ROWS * stock.processes
    lengths = torch.randint(5, 13, (n,), generator=draw)
    lengths[:ROWS] = torch.tensor([8, 6])
    return {
        "ids": torch.randint(3, 96, (n, 12), generator=draw),
        "mask": (torch.arange(12) < lengths[:, None]).long(),
        "v": torch.randn(n, 12, 96, generator=draw),
    }


def run(model: Any, stock: Stock, part: dict[str, Tensor], rectify: Any) -> Tensor:
    """Logits of a batch, zero at padding; gradients are left in the model."""
    if stock.recomputed:
        model.train().gradient_checkpointing_enable()

    def change(layer: int, logits: Tensor, weights: Tensor, index: Tensor, real: Tensor | None) -> Routing | None:
        return rectify(logits, 2, real=real, **stock.options) if stock.options else None

    with rerouted(model, change):
        logits = model(input_ids=part["ids"], attention_mask=part["mask"]).logits * part["mask"][..., None]
        (logits * part["v"]).sum().backward()
    return logits.detach()


def bytes_of_experts(model: Any) -> int:
    """What this process holds of them. A storage may say more: it is the whole file's, of which only this part is read."""
    local = [getattr(p, "_local_tensor", p) for n, p in model.named_parameters() if ".experts." in n]
    return sum(t.numel() * t.element_size() for t in local)


def one_model(stock: Stock, group: Any, folder: Path) -> dict[str, Any]:
    """This process's part of a model's pass, the gradients, and the memory; then all of them save the model together."""
    source, n, world = model_of(stock.family), stock.processes, torch.distributed.get_world_size()
    if dist.rank() == 0:
        source.save_pretrained(folder / "base")
    dist.barrier()
    config = DistributedConfig(dp_replicate_size=world // n, fsdp_size=n, ep_size=n, ep_implementation=parallel.NAME)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=config)
    part = {name: t.split(ROWS)[torch.distributed.get_rank(group)] for name, t in batch(stock).items()}
    part = {name: t[:, : int(part["mask"].sum(1).max())] for name, t in part.items()}
    found = {"bytes": bytes_of_experts(model), "logits": run(model, stock, part, lambda *a, **o: rectify_over(*a, group=group, **o))}
    found |= {f"d {name}": p.grad.full_tensor() * n for name, p in model.named_parameters()}  # theirs is the mean
    prompt = part["ids"][:1, : int(part["mask"][0].sum())]
    continued = [m.eval().generate(prompt, max_new_tokens=4, do_sample=False, synced_gpus=True) for m in (model, source)]
    found["continues"] = torch.equal(*continued)
    model.save_pretrained(folder)
    return found


def refused(folder: Path) -> str:
    """What is said where transformers brings the tokens, which follows no list."""
    config = DistributedConfig(fsdp_size=torch.distributed.get_world_size(), ep_size=torch.distributed.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=config)
    try:
        with rerouted(model, lambda *a: None):
            return ""
    except UserError as error:
        return str(error)


def main(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    dist.start(processes)
    groups = [torch.distributed.new_group([i, i + 1]) for i in range(0, processes, 2)]
    which = dist.rank() // 2
    found = {name: one(case, groups[which], which) for name, case in CASES.items()}
    for name, stock in STOCK.items():
        found[name] = one_model(stock, groups[which] if stock.processes == 2 else None, folder / name)
    found["refused"] = {"words": refused(folder / "mixtral")}
    torch.save(found, folder / f"{dist.rank()}.pt")
    dist.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
