"""A checkpoint: a Hugging Face folder with safetensors, opened lazily and checked before anything is computed.

Pickle files, remote code, truncated shards, missing tensors and non-finite weights are refused with one sentence.
"""

import json
import math
import re
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modelwright.core.errors import UserError, short
from modelwright.core.files import fingerprint
from modelwright.core.model.classes import config_of, model_class, skeleton
from modelwright.core.model.lineage import LINEAGE

SEEDLING = Path(__file__).parents[2] / "data" / "seedling"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_COMPANIONS = re.compile(
    r"(tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|vocab\.(json|txt)|merges\.txt|added_tokens\.json|"
    r"chat_template\.jinja|chat_template\.json|spiece\.model|sentencepiece\.bpe\.model|generation_config\.json|preprocessor_config\.json)"
)
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_OPEN_SHARDS = 2


def locate(base: str | Path) -> Path:
    """The local folder of a base: 'seedling', a folder, or a hub id (fetched: safetensors, json and tokenizer files only)."""
    if str(base) == "seedling":
        return SEEDLING
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{base} is a file", "a checkpoint is a folder", "give the folder that holds it")
    if folder.is_absolute() or str(base).startswith(".") or str(base).count("/") > 1:
        raise UserError(f"no folder at {base}", how="check the path")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(base), allow_patterns=["README.md", "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:
        raise UserError(
            f"{base} is neither a folder nor a hub id that can be fetched",
            short(error),
            "check the name, or download it first and give the folder",
        ) from None


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The tensor table of a safetensors file: name -> dtype, shape, data_offsets. Refuses a truncated file."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            table = dict(json.loads(f.read(length) if 0 < length <= size - 8 else b""))
        table.pop("__metadata__", None)
        end = 8 + length + max((int(t["data_offsets"][1]) for t in table.values()), default=0)
        for t in table.values():
            begin, stop = t["data_offsets"]
            width = DTYPES[t["dtype"]].itemsize if t["dtype"] in DTYPES else None
            assert isinstance(t["dtype"], str) and 0 <= begin <= stop and all(type(n) is int and n >= 0 for n in t["shape"])
            assert width is None or stop - begin == math.prod(t["shape"]) * width
    except (ValueError, TypeError, LookupError, AssertionError, RecursionError):
        raise UserError(
            f"{file} is no readable safetensors file", "its header is cut off or damaged", "copy or download it again"
        ) from None
    if end != size:
        raise UserError(
            f"{file} is truncated" if size < end else f"{file} has {size - end} bytes too many",
            f"its header promises {end} bytes and it has {size}",
            "copy or download it again",
        )
    return table


class Checkpoint:
    """A folder with config.json and safetensors weights. Opening reads headers only."""

    def __init__(self, base: str | Path, incomplete: bool = False, weights: bool = True):
        self.folder = locate(base)
        if not incomplete and (self.folder / "INCOMPLETE").exists():
            raise UserError(f"{self.folder} is incomplete", "the run that wrote it was stopped", "run it again")
        path = self.folder / "config.json"
        if not path.is_file():
            raise UserError(f"{self.folder} is no checkpoint", "it has no config.json", "point to a folder saved with save_pretrained")
        self.config = read_object(path)
        if "auto_map" in self.config:
            raise UserError(
                f"{self.folder} asks to run code that comes with it",
                "its config.json has auto_map, and remote code is never run",
                "use a checkpoint of a class that transformers has",
            )
        if "quantization_config" in self.config:
            raise UserError(
                f"{self.folder} is quantised", "its weights are codes, not numbers to work on", "give the unquantised checkpoint"
            )
        if "model_type" not in self.config:
            raise UserError(f"{path} names no model_type", how="point to a folder saved with save_pretrained")
        self.files = self._shards() if weights or any(self.folder.glob("*.safetensors*")) else []  # without: a plan from the config
        self.table: dict[str, dict[str, Any]] = {}
        self._home: dict[str, Path] = {}
        for file in self.files:
            for name, row in read_header(file).items():
                if name in self.table:
                    raise UserError(
                        f"{name} stands in {self._home[name].name} and in {file.name}",
                        "one of the two is not used",
                        "copy or download the checkpoint again",
                    )
                self.table[name], self._home[name] = row, file
        whole = next((n for n in self.table if n.endswith(".weight") and not self.dtype(n).is_floating_point), None)
        if whole:
            raise UserError(
                f"{whole} in {self.folder} is of type {self.table[whole]['dtype']}", "weights are fractions", "copy or download it again"
            )
        self._check_index()
        if (self.folder / "adapter_config.json").is_file():
            raise UserError(
                f"{self.folder} holds whole weights and an adapter",
                "transformers would apply the adapter unasked",
                "move the adapter_* files away, or merge them first",
            )
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def _check_index(self) -> None:
        """UserError where the index and the shards tell of other tensors or other places."""
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            return
        told = read_object(index)["weight_map"]
        wrong = [n for n in told.keys() | self._home.keys() if n not in told or n not in self._home or told[n] != self._home[n].name]
        if wrong:
            raise UserError(
                f"{index} does not fit its shards", f"{min(wrong)} does not stand where it says", "copy or download the checkpoint again"
            )

    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file() and (self.folder / "model.safetensors").is_file():
            raise UserError(
                f"{self.folder} has two sets of weights", "model.safetensors stands beside an index of shards", "remove one of them"
            )
        if index.is_file():
            names = read_object(index).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(f, str) and f == Path(f).name for f in names.values()):
                raise UserError(f"{index} is damaged", "its weight_map does not name files of the folder", "copy or download it again")
            files = sorted({self.folder / f for f in names.values()})
        elif (self.folder / "model.safetensors").is_file():
            files = [self.folder / "model.safetensors"]
        elif list(self.folder.glob("adapter_model.safetensors")):
            raise UserError(f"{self.folder} is an adapter", "it holds no whole model", "merge it first, or give its base")
        elif old := sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")):
            raise UserError(
                f"{self.folder} has pickle weights ({old[0]})",
                "pickle can run code when it is opened",
                "convert it once with transformers: AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)",
            )
        else:
            raise UserError(f"{self.folder} has no weights", "there is no model.safetensors")
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing", "the index names it", "copy or download the checkpoint again")
        return files

    # ---- tensors -----------------------------------------------------------------------------------------------------
    def __contains__(self, name: str) -> bool:
        return name in self.table

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._row(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        code = self._row(name)["dtype"]
        if code not in DTYPES:
            raise UserError(f"{name} in {self.folder} is of type {code}", "that type is not read here", "convert the checkpoint")
        return DTYPES[code]

    def _row(self, name: str) -> dict[str, Any]:
        if name not in self.table:
            raise UserError(f"{self.folder} has no tensor {name}", "its config promises one", "copy or download it again")
        return self.table[name]

    def get(self, name: str) -> Tensor:
        """One tensor, memory-mapped; UserError where it holds NaN or infinity."""
        self._row(name)
        file = self._home[name]
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, "pt")
            except SafetensorError as error:
                raise UserError(f"{file} is no readable safetensors file", str(error)) from None
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        tensor = self._open[file].get_tensor(name)
        require_finite(name, tensor, self.folder)
        return tensor

    def types(self) -> set[torch.dtype]:
        """The types of the stored weights."""
        return {kind for n in self.table if (kind := self.dtype(n)).is_floating_point}

    def bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(f.stat().st_size for f in self.files)

    # ---- models ------------------------------------------------------------------------------------------------------
    @cached_property
    def hf_config(self) -> Any:
        return config_of(self.config)

    @cached_property
    def skeleton(self) -> Any:
        """The model on the meta device: names and shapes, no memory."""
        model = skeleton(self.hf_config)
        for name, p in model.named_parameters():
            if name in self and self.shape(name) != tuple(p.shape):
                raise UserError(
                    f"{name} in {self.folder} has shape {self.shape(name)}",
                    f"its config.json promises {tuple(p.shape)}",
                    "copy or download the checkpoint again",
                )
        return model

    def model(self, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """The loaded model, in `dtype` or as stored. Every tensor must be there and finite.

        options: of transformers' from_pretrained: distributed_config lets each process read its own part, quantization_config rounds.
        """
        import transformers

        _ = self.skeleton  # a shape that the config does not have is refused before anything is loaded
        quiet = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            model, info = model_class(self.hf_config).from_pretrained(
                self.folder,
                dtype=dtype or ("auto" if len(self.types()) == 1 else torch.float32),  # auto would round some of several types
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # whatever transformers makes of a strange file
            raise UserError(f"{self.folder} does not load", f"{type(error).__name__}: {short(error)}") from error
        finally:
            transformers.logging.set_verbosity(quiet)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                raise UserError(
                    f"{self.folder} does not fit its config",
                    f"{problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[:3]}",
                    "copy or download it again",
                )
        for name, p in model.named_parameters():
            require_finite(name, p.to_local() if hasattr(p, "to_local") else p, self.folder)
        return model

    def tokenizer(self) -> Any:
        """The tokenizer beside the weights, or None where there is none."""
        if not any((self.folder / name).is_file() for name in _TOKENIZERS):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise UserError(f"the tokenizer in {self.folder} does not load", short(error)) from error

    def companions(self) -> list[Path]:
        """Tokenizer and generation files that travel with the weights."""
        return sorted(p for p in self.folder.iterdir() if _COMPANIONS.fullmatch(p.name) and self._own(p))

    def _own(self, path: Path) -> bool:
        """Whether a file is a regular one; a link may only point to a file that the hub's cache keeps beside the folder."""
        home = self.folder.resolve().parents[1] if "snapshots" in self.folder.resolve().parts else self.folder.resolve()
        return path.is_file() and path.resolve().is_relative_to(home)

    @cached_property
    def lineage(self) -> dict[str, Any] | None:
        path = self.folder / LINEAGE
        found = read_object(path) if path.is_file() else None
        if found is not None:
            steps = found.get("steps", [])
            if not isinstance(steps, list) or not all(isinstance(s, dict) and isinstance(s.get("step"), str) for s in steps):
                raise UserError(
                    f"{path} is not as modelwright writes it", "its steps have another shape", "remove it, or copy the folder again"
                )
        return found

    def fingerprint(self) -> str:
        """A hash of config and weights: whole for small files, size and 64 evenly spread samples for large ones."""
        return fingerprint(self.folder / "config.json", *self.files)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not valid JSON for a checkpoint", "it holds no object", "copy or download it again")
    return found


def require_finite(name: str, tensor: Tensor, where: Any) -> None:
    """UserError unless every value is finite. One vectorised pass (min and max carry NaN and infinity)."""
    if tensor.is_floating_point() and tensor.numel() and tensor.element_size() > 1:
        low, high = torch.aminmax(tensor.detach())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{name} in {where} is not finite", "it holds NaN or infinity", "repair or retrain the checkpoint")


def check_vocabulary(tokenizer: Any, vocab: int, where: Any) -> None:
    """UserError when the tokenizer can give ids that the model has no embedding for."""
    if tokenizer is not None and (top := max(tokenizer.get_vocab().values(), default=0)) >= vocab:
        raise UserError(
            f"the tokenizer in {where} does not belong to the model",
            f"its highest id is {top} and the model has {vocab} embeddings",
            "use the tokenizer that was saved with the model",
        )


def silence_transformers() -> None:
    """Quiet transformers: our own bars and sentences speak."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
