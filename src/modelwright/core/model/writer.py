"""Saving: streamed, atomic, checked.

A result is written to `TO.incomplete`, verified, and renamed to `TO` in one step: a kill at any moment leaves either
nothing at `TO` or the whole result. Tensors may arrive in any order; each goes to its own place in its shard, so the
bytes do not depend on the order and memory holds one tensor at a time.
"""

import errno
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from modelwright.core.errors import UserError
from modelwright.core.files import disk_errors
from modelwright.core.model.checkpoint import CODES, Checkpoint, require_finite
from modelwright.core.model.classes import config_of, disk_shapes
from modelwright.core.model.lineage import LINEAGE
from modelwright.core.model.portable import card_metadata, make_portable

_WRITERS = 1  # a file system serialises writes to one file; one thread is enough to overlap them with making tensors
Piece = tuple[str, Tensor] | tuple[str, Tensor, int]  # name, values, and for a slice of dimension 0 its index


@dataclass(frozen=True)
class Blueprint:
    """A checkpoint to be: config, the dtype of each tensor, and a stream of its values.

    Tensors are written by other threads while the stream goes on: a tensor must not be changed once it was given.
    """

    config: dict[str, Any]
    dtypes: dict[str, torch.dtype]
    stream: Callable[[], Iterable[Piece]]
    source: Checkpoint
    facts: dict[str, Any] = field(default_factory=dict)  # for the report and the lineage


@dataclass(frozen=True)
class Built:
    """A model made in memory, to be saved; `source` lends its tokenizer files where no tokenizer is given."""

    model: Any
    tokenizer: Any = None
    source: Checkpoint | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)  # ids that end what the assistant says: generation stops there


@contextmanager
def staging(to: Path) -> Iterator[Path]:
    """A folder beside `to` that becomes `to` when the block ends well and vanishes when it does not."""
    to = Path(to)
    if os.path.exists(to):
        raise UserError(f"{to} exists already", "nothing is overwritten", "choose another folder or remove it")
    part = to.with_name(to.name + ".incomplete")
    with disk_errors(part):
        to.parent.mkdir(parents=True, exist_ok=True)
        if part.exists():
            owner = (part / "INCOMPLETE").read_text().strip() if (part / "INCOMPLETE").is_file() else ""
            if owner.isdigit() and int(owner) != os.getpid() and Path(f"/proc/{owner}").exists():
                raise UserError(f"{part} is being written by process {owner}", how="wait for it or stop it")
            shutil.rmtree(part)
        part.mkdir()
        (part / "INCOMPLETE").write_text(f"{os.getpid()}\n")
    try:
        with disk_errors(part):
            yield part
            (part / "INCOMPLETE").unlink()
            os.rename(part, to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_tensors(blueprint: Blueprint, folder: Path, shard_size: int, tick: Callable[[int], Any] = lambda n: None) -> None:
    """Write the blueprint's config and tensors into `folder`; `tick(bytes)` reports progress.

    Names and shapes are the stock class's own, taken from its conversion on the meta device; a tensor too many,
    too few or of another shape is a fault of the method and raises.
    """
    shapes = disk_shapes(config_of(blueprint.config))
    if shapes.keys() != blueprint.dtypes.keys():
        raise RuntimeError(f"the stock class and the method disagree on {sorted(shapes.keys() ^ blueprint.dtypes.keys())[:4]}")
    sizes = {n: torch.Size(s).numel() * blueprint.dtypes[n].itemsize for n, s in shapes.items()}
    need, free = sum(sizes.values()) + (1 << 20), shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"no disk space for {folder}",
            f"the result needs {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free",
            "free some or choose another folder",
        )
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes, key=natural):
        if filled and filled + sizes[name] > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    place: dict[str, tuple[int, int]] = {}
    todo = dict(sizes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors" for i in range(len(shards))]
    handles: list[int] = []
    try:
        for file, names in zip(files, shards, strict=True):
            table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            at = 0
            for n in names:
                table[n] = {"dtype": CODES[blueprint.dtypes[n]], "shape": list(shapes[n]), "data_offsets": [at, at + sizes[n]]}
                at += sizes[n]
            header = json.dumps(table, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
            fd = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            handles.append(fd)
            _write(fd, memoryview(len(header).to_bytes(8, "little") + header), 0)
            for n in names:
                place[n] = (fd, 8 + len(header) + table[n]["data_offsets"][0])
        with ThreadPoolExecutor(_WRITERS) as pool:  # writing releases the interpreter, so copies overlap with making the next tensor
            flying: deque[Future[None]] = deque()
            seen: set[tuple[str, int | None]] = set()
            for piece in blueprint.stream():
                name, tensor = piece[0], piece[1]
                index = piece[2] if len(piece) == 3 else None
                want = shapes[name] if index is None else shapes[name][1:]
                if (name, index) in seen or index is not None and not 0 <= index < shapes[name][0]:
                    raise RuntimeError(f"{name}[{index}] came twice or does not exist")
                seen.add((name, index))
                if tuple(tensor.shape) != want or tensor.dtype != blueprint.dtypes[name]:
                    raise RuntimeError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {want} {blueprint.dtypes[name]}")
                data = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                fd, offset = place[name]
                if len(flying) > _WRITERS:
                    flying.popleft().result()
                flying.append(pool.submit(_write, fd, data, offset + (index or 0) * len(data)))
                todo[name] -= len(data)
                tick(len(data))
            for f in flying:
                f.result()
    finally:
        for fd in handles:
            os.close(fd)
    if short := [n for n, left in todo.items() if left]:
        raise RuntimeError(f"the stream ended without {short[:4]}")
    if len(shards) > 1:
        index_map = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": index_map}, indent=1)
        )
    copy_companions(blueprint.source, folder)
    (folder / "config.json").write_text(json.dumps(blueprint.config, indent=2, sort_keys=True) + "\n")
    make_portable(folder)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def write_model(built: Built, folder: Path, shard_size: int) -> dict[str, Any]:
    """Write an in-memory model with its tokenizer; refuses non-finite weights. Returns facts: where generation stops."""
    model, tokenizer = built.model, built.tokenizer
    for name, p in model.named_parameters():
        require_finite(name, p, "the result")
    if built.source is not None and "use_cache" in built.source.config:
        model.config.use_cache = built.source.config["use_cache"]
    if built.stops and tokenizer is None and built.source is not None:
        tokenizer = built.source.tokenizer()
    facts = set_stops(model, tokenizer, built.stops)
    try:
        model.save_pretrained(folder, max_shard_size=shard_size)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if built.source and built.tokenizer is None:
        copy_companions(built.source, folder)
    make_portable(folder)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o644)
    return facts


def set_stops(model: Any, tokenizer: Any, stops: list[int]) -> dict[str, Any]:
    """Let generation end where training ended the assistant's turns: config, generation config and tokenizer agree."""
    if not stops:
        return {}
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        before = model.generation_config.eos_token_id
        old = before if isinstance(before, list) else [] if before is None else [before]
        ends = list(dict.fromkeys([*stops, *old]))
        model.generation_config.eos_token_id = model.config.eos_token_id = ends if len(ends) > 1 else ends[0]
    said = [str(s) for s in stops]
    if tokenizer is not None:
        said = [str(w) for w in tokenizer.convert_ids_to_tokens(stops)]
        if not _template_depends_on_eos(tokenizer, said[0]):
            tokenizer.eos_token = said[0]
    return {"generation stops at": ", ".join(said)}


def _template_depends_on_eos(tokenizer: Any, eos: str) -> bool:
    """Whether the chat template would render other text if the tokenizer's end token were `eos`."""
    template = getattr(tokenizer, "chat_template", None)
    if not template or "eos_token" not in str(template) or tokenizer.eos_token == eos:
        return False
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = tokenizer.eos_token
    try:
        told = tokenizer.apply_chat_template(chat, tokenize=False)
        tokenizer.eos_token = eos
        return tokenizer.apply_chat_template(chat, tokenize=False) != told
    except Exception:  # a template is a program: what cannot be compared stays as it was
        return True
    finally:
        tokenizer.eos_token = before


def as_stored(model: Any, source: Checkpoint, dtype: str) -> float | None:
    """Round the model in place to the type that it is saved in: the source's, tensor by tensor where their names agree, or `dtype`.

    Returns the share of 16-bit weights that rounding gave back to the source although they were trained (None where there are none).
    """
    wanted = None if dtype == "source" else getattr(torch, dtype)
    kinds = [source.dtype(n) for n in source.table]
    usual = max(set(kinds), key=kinds.count)
    same = total = 0
    for name, p in model.named_parameters():
        stored = source.dtype(name) if name in source else usual
        kind = wanted or (stored if stored.is_floating_point else usual)
        with torch.no_grad():
            before = p.data
            if p.dtype != kind:
                p.data = p.data.to(kind)
            if kind.itemsize == 2 and before.dtype == torch.float32 and name in source and p.shape == source.shape(name):
                step = max(1, p.numel() // 4096)
                old, exact = source.get(name).flatten()[::step].to(before.device), before.flatten()[::step]
                moved = exact != old.float()
                same += int(((p.flatten()[::step] == old) & moved).sum())
                total += int(moved.sum())
    model.config.dtype = wanted or usual
    return same / total if total else None


def copy_companions(source: Checkpoint, folder: Path) -> None:
    """Copy tokenizer and generation files that are not there yet."""
    for path in source.companions():
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def write_card(
    folder: Path,
    title: str,
    base: str,
    steps: list[dict[str, Any]],
    rows: list[tuple[str, str]],
    loads_in: str,
    base_folder: Path | None = None,
) -> None:
    """README.md of a result: what it is, what it loads in, how it was made, what was measured, with metadata that the hub reads."""
    import yaml

    recipe = yaml.safe_dump({"base": base, "steps": [{s["step"]: s["knobs"]} for s in steps]}, sort_keys=False, width=100)
    table = "\n".join(f"| {_inline(k)} | {_inline(v)} |" for k, v in rows)
    meta = card_metadata(None if base == "none" else base, base_folder, steps, loads_in)
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(meta, sort_keys=False)}---\n# {_inline(title)}\n\nMade by modelwright; loads as `{loads_in}`.\n\n"
        f"| measured | value |\n|---|---|\n{table}\n\n## Recipe\n```yaml\n{recipe}```\n\nThe full lineage is in `{LINEAGE}`.\n",
        encoding="utf-8",
    )


def _inline(text: str) -> str:
    """Text as one line of Markdown that is shown as it stands."""
    return re.sub(r"([<>|`\\*_\[\]])", r"\\\1", " ".join(str(text).split()))


def natural(name: str) -> list[Any]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
