"""Mapped entity vectors in the place of input embeddings: f(e) = W e + b, plugged into any model by two hooks and taken out again.

A token id from `offset` up stands for an entity. Without such an id the plugged model is the model, bit for bit; unplugged it is again.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelwright.core.errors import UserError
from modelwright.tune.entities.vectors import Vectors

NAME = "entity_map"  # of the module in the model, and of its file


class EntityMap(nn.Module):
    """W (d, n) and b (d,), and the vectors (K + 1, n); the last vector is 0 and stands for an entity without one, f(0) = b."""

    vectors: Tensor

    def __init__(self, vectors: Vectors, width: int, offset: int):
        super().__init__()
        self.map = nn.Linear(vectors.values.shape[1], width)
        self.offset = offset
        zero = vectors.values.new_zeros(1, vectors.values.shape[1])
        self.register_buffer("vectors", torch.cat([vectors.values, zero]), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Mapped vectors (N, d) of token ids (N,)."""
        out: Tensor = self.map(self.vectors[ids - self.offset].to(self.map.weight.dtype))
        return out

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach().float().contiguous() for n, p in self.map.named_parameters()}, folder / f"{NAME}.safetensors")

    @torch.no_grad()
    def load(self, path: str) -> None:
        """The map of a file, or the last one in the folder of a result."""
        at = Path(path).expanduser()
        found = [at] if at.is_file() else sorted(at.rglob(f"{NAME}.safetensors"))
        if not found:
            raise UserError(f"no map at {path}", f"there is no {NAME}.safetensors", "give the result of an earlier map-tuning")
        held = load_file(found[-1])
        if held["weight"].shape != self.map.weight.shape:
            n, d = self.map.weight.shape[1], self.map.weight.shape[0]
            raise UserError(
                f"the map at {path} has shape {tuple(held['weight'].shape)}", f"vectors of {n} go into a model of {d}", "check both"
            )
        for name, p in self.map.named_parameters():
            p.copy_(held[name])


class Plug:
    """The hooks on one model's input embedding; `remove()` takes them and the map out."""

    def __init__(self, model: Any, entity_map: EntityMap):
        self.model, self.map = model, entity_map
        embedding = model.get_input_embeddings()
        self.scale = float(getattr(embedding, "embed_scale", 1.0))  # some embeddings multiply what they look up
        model.add_module(NAME, entity_map.to(embedding.weight.device))
        self._ids: Tensor | None = None
        self._handles = [embedding.register_forward_pre_hook(self._before), embedding.register_forward_hook(self._after)]

    def _before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._ids = args[0]
        return (torch.where(args[0] >= self.map.offset, 0, args[0]), *args[1:])

    def _after(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        assert self._ids is not None
        here = self._ids >= self.map.offset
        if not self.model.training and not bool(here.any()):
            return out
        return out.index_put((here,), (self.map(self._ids[here]) * self.scale).to(out.dtype))

    def remove(self) -> None:
        for h in self._handles:
            h.remove()
        if hasattr(self.model, NAME):
            delattr(self.model, NAME)


@torch.no_grad()
def add_rows(model: Any, entity_map: EntityMap, entities: int, tokenizer: Any, names: list[str]) -> None:
    """Write the mapped entities as embedding rows from `offset` on, and a token <entity:ID> for each into the tokenizer.

    The model must not say them: their output bias is -10,000 where there is one, and generate() is told to suppress them.
    """
    from tokenizers import AddedToken

    first, weight = entity_map.offset, model.get_input_embeddings().weight
    rows = entity_map(torch.arange(first, first + entities, device=entity_map.vectors.device))
    if first + entities > len(weight):
        model.resize_token_embeddings(first + entities, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight[first : first + entities] = rows.to(embedding.weight)
    if head is not None and head.weight is not embedding.weight and head.weight.data_ptr() != embedding.weight.data_ptr():
        head.weight[first : first + entities] = 0
    if head is not None and getattr(head, "bias", None) is not None:
        head.bias[first : first + entities] = -1e4
    if model.can_generate():
        model.generation_config.suppress_tokens = list(range(first, first + entities))
    tokenizer.add_tokens([AddedToken(f"<entity:{n}>", normalized=False, special=True) for n in names])
    got = tokenizer.convert_tokens_to_ids(f"<entity:{names[-1]}>")
    if got != first + entities - 1:
        raise UserError("the tokenizer gave an entity another id", f"{names[-1]} got {got}", "use a tokenizer without free ids")
