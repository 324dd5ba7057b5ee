"""What a response is worth: a reward model in a folder, or a Python function by its name.

A folder holds a reward model as reward.train or TRL writes one: a sequence classifier with one label. Its reward is `logits[:, 0]`, less
the bias of the prompt where the model has one, read where the classifiers of transformers read it. A function is called as TRL calls one,
with keywords: f(prompts=, completions=, completion_ids=) -> one number a response; it may leave out what it does not read. The name may
also be that of a model object, or of a calibrated wrapper around a function or a model.
"""

import importlib
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.errors import UserError, short
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.models.reward import RewardFunction


def function(name: str) -> Any:
    """The object called `package.module:name`, or `file.py:name`. UserError where there is none."""
    module, colon, attribute = name.rpartition(":")
    if not colon or not module or not attribute:
        raise UserError(f"reward_function={name} names no function", how="write package.module:function")
    try:
        found = _imported(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module of a person may raise anything
        raise UserError(f"the reward function {name} cannot be imported", f"{type(error).__name__}: {short(error)}") from None
    if not callable(found):
        raise UserError(f"{name} is no function", f"it is a {type(found).__name__}")
    return found


def _imported(module: str) -> Any:
    if not module.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(Path(module).stem, Path(module).expanduser())
    if spec is None or spec.loader is None or not Path(module).expanduser().is_file():
        raise FileNotFoundError(f"no file at {module}")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Reward:
    """Numbers for whole responses, from a folder or from a function."""

    def __init__(self, folder: str | None, name: str | None, tokenizer: Any):
        if bool(folder) == bool(name):
            raise UserError(
                "one reward is needed",
                "reward and reward_function are both given" if folder else "neither reward nor reward_function is given",
                "give one",
            )
        self.tokenizer, self.folder, self.name = tokenizer, folder, str(folder or name)
        self.model: Any = None
        self.same_tokens = True  # whether a reward model reads the policy's token ids
        self._texts_of: RewardFunction | None = None  # a reward model with a tokenizer of its own
        self._call: Any = None
        if folder:
            self._checked(Checkpoint(folder))
            return
        found = function(self.name)
        if isinstance(found, nn.Module):
            self.model = found.eval()
        else:
            self._call, self._takes = found, _keywords(found)

    def _checked(self, source: Checkpoint) -> None:
        kind, labels = type(source.skeleton).__name__, getattr(source.hf_config, "num_labels", 2)
        if not kind.endswith(("ForSequenceClassification", "RewardModel")):
            raise UserError(f"{self.name} is no reward model", f"it is a {kind}", "give a folder that reward.train wrote")
        if labels != 1:
            raise UserError(f"{self.name} sorts texts into {labels} classes", "a reward model has one", "give num_labels 1")
        own = source.tokenizer()
        self.same_tokens = own is None or self.tokenizer is None or own.get_vocab() == self.tokenizer.get_vocab()

    def load(self, dtype: Any) -> None:
        """Load the reward model."""
        if self.folder and self.model is None:
            made = RewardFunction(self.folder, dtype=dtype)
            self.model, self._texts_of = made.model, None if self.same_tokens else made

    def to(self, device: Any) -> None:
        if self.model is not None:
            self.model.to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[Tensor], responses: list[Tensor], size: int) -> Tensor:
        """One reward a response, (B,) float32. UserError for NaN, infinity or another number of values."""
        if self._texts_of is not None:  # another tokenizer reads the text, control tokens of the policy left out
            values = self._texts_of(self._texts(prompts), self._texts(responses))
        elif self.model is not None:
            values = [v for i in range(0, len(prompts), size) for v in self._scores(prompts[i : i + size], responses[i : i + size])]
        else:
            given = {
                "prompts": self._texts(prompts),
                "completions": self._texts(responses),
                "completion_ids": [r.tolist() for r in responses],
            }
            try:
                values = list(self._call(**{k: v for k, v in given.items() if self._takes is None or k in self._takes}))
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"the reward function {self.name} failed", f"{type(error).__name__}: {short(error)}") from error
        if len(values) != len(responses):
            raise UserError(f"the reward {self.name} gave {len(values)} values", f"it was asked about {len(responses)} responses")
        try:
            numbers = [float(v) for v in values]
        except (TypeError, ValueError):
            raise UserError(f"the reward {self.name} gave something that is no number", how="return one number a response") from None
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"the reward {self.name} is not finite", f"response {[math.isfinite(n) for n in numbers].index(False)} got it")
        return torch.tensor(numbers, dtype=torch.float32)

    def _texts(self, ids: list[Tensor]) -> list[Any]:
        if self.tokenizer is None:
            return [i.tolist() for i in ids]
        return list(self.tokenizer.batch_decode([i.tolist() for i in ids], skip_special_tokens=True))

    def _scores(self, prompts: list[Tensor], responses: list[Tensor]) -> list[float]:
        whole, config = [torch.cat([p, r]) for p, r in zip(prompts, responses, strict=True)], self.model.config
        if config.pad_token_id is None:  # transformers finds the last token by the padding, so it must not stand inside a text
            used = set(torch.cat(whole).tolist())
            config.pad_token_id = next(i for i in range(len(used) + 1) if i not in used) % int(config.get_text_config().vocab_size)
            try:
                return self._scores(prompts, responses)
            finally:
                config.pad_token_id = None
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=config.pad_token_id)
        seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(w) for w in whole], batch_first=True)
        text = config.get_text_config()
        if ids.shape[1] > (getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or ids.shape[1]):
            raise UserError(
                f"a text of {ids.shape[1]} tokens is too long for the reward model", how="lower response_tokens or prompt_tokens"
            )
        inputs = {"input_ids": ids, "attention_mask": seen}
        if "prompt_lengths" in inspect.signature(self.model.forward).parameters:
            inputs["prompt_lengths"] = torch.tensor([len(p) for p in prompts])
        logits = self.model(**{k: v.to(self.model.device) for k, v in inputs.items()}).logits
        if logits.shape[1:] != (1,):
            raise UserError(
                f"the reward model {self.name} gives {tuple(logits.shape[1:])} values a text", "a reward is one", "give num_labels 1"
            )
        return logits[:, 0].float().tolist()


def _keywords(f: Any) -> set[str] | None:
    """What a function takes by keyword; None where it takes anything."""
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}
