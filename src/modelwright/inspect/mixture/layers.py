"""The experts of any mixture, one layer at a time, in one shape: rows are neurons.

A checkpoint on disk stores experts one by one (Mixtral's w1, w2, w3; gate_proj, up_proj, down_proj) or fused (Granite's
input_linear; gate_up_proj). Both are read straight from the files, so memory holds one layer, not the model.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy, View
from modelwright.core.model.checkpoint import Checkpoint

KINDS = ("gate", "up", "down")
_LAYER = re.compile(r"^(.*?layers\.(\d+))\.(.*)$")
_ONE = re.compile(r"(?:^|\.)experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")
_FUSED = re.compile(r"(?:^|\.)(?:experts\.(gate_up_proj|down_proj)|block_sparse_moe\.(input_linear|output_linear)\.weight)$")
_ROUTER = re.compile(r"^(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router|router\.layer)\.weight$")
_SHARED = re.compile(r"(?:^|\.)(?:shared_experts?\.(gate_proj|up_proj|down_proj)|shared_mlp\.(input_linear|output_linear))\.weight$")
_PIECE = {"w1": "gate", "w3": "up", "w2": "down", "input_linear": "gate_up", "output_linear": "down"}


def _piece(word: str) -> str:
    return _PIECE.get(word, word.removesuffix("_proj"))


@dataclass
class MixtureLayer:
    """One sparse layer. Members are the experts "0", "1", ...; then "shared" and "dense", where they are there."""

    index: int
    experts: int
    readers: dict[tuple[str, str], Callable[[], Tensor]] = field(default_factory=dict)  # (member, kind) -> (F, d)
    router: Callable[[], Tensor] | None = None  # (E, d)

    @property
    def members(self) -> list[str]:
        return list(dict.fromkeys(m for m, _ in self.readers))

    def rows(self, kind: str) -> list[Tensor]:
        """Of each member the matrix whose rows are its neurons, (F, d), as stored: gate and up as they are, down transposed."""
        return [self.readers[m, kind]() for m in self.members]


def mixture_layers(source: Checkpoint, dense: Checkpoint | None = None) -> list[MixtureLayer]:
    """The sparse layers of a checkpoint in order of depth; each also reads the same layer of the model `dense`."""
    found: dict[int, dict[str, Any]] = {}
    for name in source.table:
        if at := _LAYER.match(name):
            _sort_in(found.setdefault(int(at[2]), {"one": {}, "fused": {}, "shared": {}, "router": None}), name, at[3])
    layers = [_layer(source, index, parts) for index, parts in sorted(found.items()) if parts["one"] or len(parts["fused"]) == 2]
    if not layers:
        raise UserError(
            f"{source.folder} has no experts to look into",
            f"{source.config['model_type']} has no routed feed-forward part that is known here",
            "give a mixture of experts, or make one with reshape.upcycle or reshape.moefy",
        )
    if dense is not None:
        _add_dense(layers, dense)
    return layers


def _sort_in(parts: dict[str, Any], name: str, rest: str) -> None:
    if one := _ONE.search(rest):
        parts["one"][int(one[1]), _piece(one[2])] = name
    elif shared := _SHARED.search(rest):
        parts["shared"][_piece(shared[1] or shared[2])] = name
    elif fused := _FUSED.search(rest):
        parts["fused"][_piece(fused[1] or fused[2])] = name
    elif _ROUTER.match(rest):
        parts["router"] = name


def _layer(source: Checkpoint, index: int, parts: dict[str, Any]) -> MixtureLayer:
    if parts["one"]:
        experts = 1 + max(e for e, _ in parts["one"])
        missing = [f"{kind} of expert {e}" for e in range(experts) for kind in KINDS if (e, kind) not in parts["one"]]
        if missing:
            raise UserError(f"layer {index} of {source.folder} lacks {missing[0]}", "its experts have a gate, an up and a down matrix each")
        layer = MixtureLayer(index, experts)
        for e in range(experts):
            for kind in KINDS:
                layer.readers[str(e), kind] = _whole(source, parts["one"][e, kind], kind)
    else:
        gate_up, down = parts["fused"]["gate_up"], parts["fused"]["down"]
        experts, half = source.shape(gate_up)[0], source.shape(gate_up)[1] // 2
        if source.shape(down)[2] != half:
            raise UserError(
                f"the experts of {source.folder} are stored in an order that is not known here",
                f"{gate_up} is {source.shape(gate_up)} and {down} is {source.shape(down)}",
            )
        layer = MixtureLayer(index, experts)
        for e in range(experts):
            for kind in KINDS:
                layer.readers[str(e), kind] = _slice(source, gate_up, down, kind, half, e)
    shared = parts["shared"]
    if {"gate_up", "down"} <= shared.keys():
        half = source.shape(shared["gate_up"])[0] // 2
        for kind in KINDS:
            layer.readers["shared", kind] = _slice(source, shared["gate_up"], shared["down"], kind, half, None)
    elif set(KINDS) <= shared.keys():
        for kind in KINDS:
            layer.readers["shared", kind] = _whole(source, shared[kind], kind)
    if (router := parts["router"]) and source.shape(router)[0] == experts:
        layer.router = lambda: source.get(router)
    return layer


def _whole(source: Checkpoint, name: str, kind: str) -> Callable[[], Tensor]:
    return lambda: source.get(name).T if kind == "down" else source.get(name)


def _slice(source: Checkpoint, gate_up: str, down: str, kind: str, half: int, e: int | None) -> Callable[[], Tensor]:
    def read() -> Tensor:
        matrix = source.get(down if kind == "down" else gate_up)
        matrix = matrix if e is None else matrix[e]
        return matrix.T if kind == "down" else matrix[:half] if kind == "gate" else matrix[half:]

    return read


def _matrix(source: Checkpoint, view: View, kind: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        matrix = view.read(source.get)
        return matrix.T if kind == "down" else matrix

    return read


def _add_dense(layers: list[MixtureLayer], dense: Checkpoint) -> None:
    anatomy = Anatomy(dense.skeleton)
    if anatomy.experts:
        raise UserError(f"{dense.folder} is a mixture of experts", "dense names the model that the experts are compared with")
    depth = len(anatomy.blocks)
    for layer in layers:
        if layer.index >= depth:
            raise UserError(
                f"{dense.folder} has no layer {layer.index}", f"it has {depth} layers", "give the model that the mixture was made from"
            )
        ffn = anatomy.ffn(layer.index)
        if ffn.gate is None:
            raise UserError(f"{dense.folder} cannot be compared with the experts", "its feed-forward part has no gate")
        for kind, view in (("gate", ffn.gate), ("up", ffn.up), ("down", ffn.down)):
            layer.readers["dense", kind] = _matrix(dense, view, kind)
        width, own = layer.readers["dense", "gate"]().shape[1], layer.readers["0", "gate"]().shape[1]
        if width != own:
            raise UserError(f"{dense.folder} has hidden size {width} and the mixture has {own}", "their neurons cannot be compared")


def chunks(neurons: int, per_neuron: int, budget: int = 1 << 22) -> Iterator[slice]:
    """Ranges of neurons that hold about `budget` values."""
    step = max(1, budget // max(per_neuron, 1))
    for start in range(0, neurons, step):
        yield slice(start, min(start + step, neurons))


def as_rows(matrices: list[Tensor], part: slice) -> Tensor:
    """A range of neurons of several matrices of one shape, each flattened: (members, n * d), fp64."""
    return torch.stack([m[part].double().flatten() for m in matrices])
