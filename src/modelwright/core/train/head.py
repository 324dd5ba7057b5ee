"""The language-model head over chunks of tokens: losses without ever holding the logits of a batch.

Logits of 4,096 tokens over 128,256 words take 2.1 GB in fp32, and cross-entropy holds them about three times. Here the head and the
cross-entropy run over a few hundred tokens at a time, those alone that have a target, and the gradient of each chunk is computed in the
forward pass: nothing is computed twice, and what stays is the gradient of the states and of the head.

The head is called as the model calls it: its own forward runs with the trunk replaced by the states of a chunk. Softcaps, scales, biases
and transforms are the model's own, whatever its class.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.core.data.rows import IGNORE
from modelwright.core.train import dist

Loss = Callable[[Tensor, Tensor], Tensor]
_PROBE = "probe"  # instead of a loss: the logits of head and trunk apart
_LOGITS = 1 << 25  # held at a time: 128 MB in fp32


class _Reached(Exception):
    """Carries the trunk's output out of the model's forward."""

    def __init__(self, output: Any):
        self.output = output


class _Until(nn.Module):
    """Runs the trunk and stops there."""

    trunk: nn.Module

    def __init__(self, trunk: nn.Module):
        super().__init__()
        object.__setattr__(self, "trunk", trunk)  # not a child: names and hooks stay as they are

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(self.trunk(*args, **kwargs))


class _Instead(nn.Module):
    """Gives states in the place of the trunk."""

    def __init__(self, output: Any, states: Tensor):
        super().__init__()
        self.output = type(output)(last_hidden_state=states)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class ChunkedHead:
    """`model(**inputs, loss_of=(labels, weights, states))` gives (losses, weighted sum) instead of logits."""

    @classmethod
    def install(cls, model: Any) -> "Self | None":
        """None where the head cannot be called alone."""
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        prefix = core.base_model_prefix or "-"
        for name in (prefix, f"{prefix}.decoder", "decoder"):  # OPT calls model.decoder, T5 has no common trunk
            if name in dict(core.named_modules()):
                head = cls(core, name)
                if head._fits(model):
                    return head
                head.remove()
        return None

    def __init__(self, core: Any, name: str):
        self.core, self.name = core, name.rpartition(".")[2]
        self._holder = core.get_submodule(name.rpartition(".")[0])._modules
        self.original: Callable[..., Any] = core.forward
        self._own = core.__dict__.get("forward")
        self._routed = "output_router_logits" in inspect.signature(core.forward).parameters
        core.forward = self._forward

    def remove(self) -> None:
        if self._own is None:
            del self.core.forward
        else:
            self.core.forward = self._own

    @contextlib.contextmanager
    def _trunk(self, module: nn.Module) -> Iterator[None]:
        real = self._holder[self.name]
        self._holder[self.name] = module
        try:
            yield
        finally:
            self._holder[self.name] = real

    def _forward(self, *args: Any, loss_of: Any = None, **inputs: Any) -> Any:
        if loss_of is None:
            return self.original(*args, **inputs)
        if loss_of is _PROBE:
            output = self._reached(inputs)
            return self.logits(output, output[0][0])
        labels, weights, states_of = loss_of
        output = self._reached(inputs)
        states = states_of(output[0])
        learnt = labels != IGNORE
        total, flat = self._losses(output, states[learnt], labels[learnt], weights[learnt])
        losses = torch.zeros(labels.shape, dtype=flat.dtype, device=flat.device)
        losses[learnt] = flat
        return losses, total + 0 * states.sum().to(total) if not bool(learnt.any()) else total

    def _reached(self, inputs: dict[str, Any]) -> Any:
        with self._trunk(_Until(self._holder[self.name])):
            try:
                self.original(**inputs)
            except _Reached as reached:
                return reached.output
        raise RuntimeError(f"{type(self.core).__name__} never calls {self.name}")

    def logits(self, output: Any, states: Tensor) -> Tensor:
        """Logits (N, V) of states (N, d), by the model's own forward."""
        inputs: dict[str, Any] = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=states.device)}
        if self._routed:
            inputs["output_router_logits"] = False
        if self.core.config.is_encoder_decoder and self.name == "decoder":
            inputs = {"encoder_outputs": (states[None],), "decoder_input_ids": inputs["input_ids"]}
        with self._trunk(_Instead(output, states[None])):
            return self.original(**inputs).logits[0]

    def _losses(self, output: Any, states: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        def loss(part: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(output, part).float(), targets, reduction="none")

        return self.weighted(loss, states, labels, weights)

    def weighted(self, loss: Loss, states: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of `loss(states (n, d), targets (n,)) -> (n,)` over chunks of N states, with a gradient; and the losses (N,)."""
        size = max(1, _LOGITS // int(self.core.config.get_text_config().vocab_size))
        weights = weights.to(states.device).float()
        if not torch.is_grad_enabled():
            found = [loss(states[i : i + size], targets[i : i + size]) for i in range(0, len(states), size)]
            flat = torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)
            return (flat * weights).sum(), flat
        trunk = {id(p) for p in self._holder[self.name].parameters()}
        embedding = self.core.get_output_embeddings()
        shared = [] if embedding is None else list(embedding.parameters())
        outside = [p for p in self.core.parameters() if id(p) not in trunk]
        params = [p for p in {id(p): p for p in [*outside, *shared]}.values() if p.requires_grad]
        return _Weighted.apply(loss, size, states, targets, weights, *params)

    @torch.no_grad()
    def _fits(self, model: Any) -> bool:
        """Whether head and trunk called apart give what the model gives, on a few tokens.

        A sharded model is called as a module, which puts its weights together; any other past the hooks of the methods.
        """
        core, training = self.core, model.training
        sharded = any(dist.offset(p) is not None for p in core.parameters())
        call: Any = model if sharded else core.forward
        model.eval()
        ids = torch.arange(4, device=core.device)[None] % int(core.config.get_text_config().vocab_size)
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if core.config.is_encoder_decoder else {})
        try:
            whole, apart = call(**inputs).logits[0].float(), call(**inputs, loss_of=_PROBE).float()
            return torch.allclose(apart, whole, atol=1e-3 * float(whole.abs().max() + 1), equal_nan=True)
        except (TypeError, ValueError, KeyError, IndexError, RuntimeError, AttributeError):
            return False
        finally:
            model.train(training)
            dist.reshard(model)


class _Weighted(torch.autograd.Function):
    """The weighted sum of losses and the losses; gradients are computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Any, size: int, states: Tensor, labels: Tensor, weights: Tensor, *params: Tensor) -> Any:
        grad_states = torch.zeros_like(states)
        grads: list[Tensor | None] = [None] * len(params)
        total, found = torch.zeros((), device=states.device), []
        for i in range(0, len(states), size):
            with torch.enable_grad():
                part = states[i : i + size].detach().requires_grad_()
                each = loss(part, labels[i : i + size])
                weighted = (each * weights[i : i + size]).sum()
            first, *rest = torch.autograd.grad(weighted, [part, *params], allow_unused=True)
            grad_states[i : i + size] = first
            for k, g in enumerate(rest):
                if g is not None:
                    grads[k] = g if grads[k] is None else grads[k].add_(g)  # type: ignore[union-attr]
            total += weighted.detach()
            found.append(each.detach())
        ctx.given = [g is not None for g in grads]
        ctx.save_for_backward(grad_states, *[g for g in grads if g is not None])
        flat = torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)
        ctx.mark_non_differentiable(flat)
        return total, flat

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        states, *kept = ctx.saved_tensors
        rest = iter(kept)
        return None, None, states * grad.to(states.dtype), None, None, *[next(rest).mul_(grad) if g else None for g in ctx.given]
