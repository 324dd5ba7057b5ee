"""A fitted calibrator around a reward, for training: a reward function, or a reward model with `.logits`.

Both fit TRL: `CalibratedFunction` is a GRPO or RLOO reward function, `CalibratedModel` is what RewardTrainer evaluates and
what GRPO and RLOO call for `.logits`. The calibrator must have been fitted on the feature that is seen here: a function is
given completions, a model whole sequences in tokens (prompt and completion). A model that is read below its forward (TRL's
PPO before its removal called `.score` on the backbone) is not corrected.

Ours; the paper (arXiv 2409.17407) corrects recorded scores only.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from modelwright.core.errors import UserError
from modelwright.reward.calibrate import Calibrator
from modelwright.reward.table.scores import COUNTS


class CalibratedFunction:
    """f(prompts=, completions=, **columns) -> list of float, less the bias of each completion.

    A feature is, in this order: a function of the completion's text given in `features`, a column of the call, the tokens
    of completion_ids, or length (characters), words, markdown. A reward of None stays None.
    """

    def __init__(
        self, function: Callable[..., list[Any]], calibrator: Calibrator, features: dict[str, Callable[[str], float]] | None = None
    ):
        calibrator.bias({f: np.zeros(1) for f in calibrator.features})  # fitted?
        self.function, self.calibrator, self.features = function, calibrator, features or {}
        self.__name__ = f"calibrated_{getattr(function, '__name__', 'reward')}"  # TRL logs by this name

    def __call__(self, *, completions: list[Any], **columns: Any) -> list[Any]:
        rewards = self.function(completions=completions, **columns)
        found = {name: self._feature(name, completions, columns) for name in self.calibrator.features}
        return [None if r is None else float(r) - b for r, b in zip(rewards, self.calibrator.bias(found).tolist(), strict=True)]

    def _feature(self, name: str, completions: list[Any], columns: dict[str, Any]) -> np.ndarray:
        if name in self.features:
            return np.array([self.features[name](_text(c)) for c in completions], np.float64)
        if name in columns:
            return np.asarray(columns[name], np.float64)
        if name == "tokens" and "completion_ids" in columns:
            return np.array([len(ids) for ids in columns["completion_ids"]], np.float64)
        if name in COUNTS:
            return np.array([COUNTS[name](_text(c)) for c in completions], np.float64)
        raise UserError(f"the feature '{name}' is missing", "no column and no function gives it", f"pass features={{'{name}': function}}")


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(m["content"] for m in completion)


class CalibratedModel(nn.Module):
    """A sequence classifier with one label whose logits are less the bias of the sequence's length in tokens.

    The length is the sum of attention_mask, or the number of input_ids that are not padding. The bias is a constant for the
    gradient. Everything else (config, device, dtype, ...) is the model's own.
    """

    def __init__(self, model: nn.Module, calibrator: Calibrator):
        super().__init__()
        if len(calibrator.features) != 1:
            raise UserError(
                f"the calibrator has {len(calibrator.features)} features", "a model sees the length only", "fit it on the length in tokens"
            )
        calibrator.bias({calibrator.features[0]: np.zeros(1)})  # fitted?
        self.model, self.calibrator = model, calibrator

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        """input_ids (B, T), attention_mask (B, T); the model's output with logits (B, 1)."""
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        if attention_mask is None:
            pad = self.config.pad_token_id
            if input_ids is None or pad is None:
                raise UserError(
                    "the length of the sequences is unknown", "there is no attention_mask and no padding token", "pass attention_mask"
                )
            attention_mask = input_ids.ne(pad)
        length = attention_mask.sum(-1).cpu().numpy().astype(np.float64)  # (B,)
        bias = self.calibrator.bias({self.calibrator.features[0]: length})
        part = torch.from_numpy(bias)[:, None].to(out.logits.device, torch.float32)
        out.logits = (out.logits.float() - part).to(out.logits.dtype)
        return out
