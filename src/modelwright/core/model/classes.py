"""From a config.json to transformers' classes: the config object, the model's class, an empty model, and what it writes to disk."""

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor

from modelwright.core.errors import UserError, did_you_mean, short, shown

_MOST = {  # what no model has: building it would never end
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), 2_000),
    **dict.fromkeys(("num_labels", "vocab_size"), 10_000_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 100_000),
}


def config_of(raw: dict[str, Any]) -> Any:
    """The transformers config object of a config.json's content."""
    from transformers import CONFIG_MAPPING, AutoConfig

    values = {k: v for k, v in raw.items() if k not in ("model_type", "transformers_version")}
    for key, most in _MOST.items():
        if isinstance(n := raw.get(key), (int, float)) and not 0 <= n <= most:
            raise UserError(f"{key}={shown(n)} in config.json does not fit", f"it must be between 0 and {most:,}", "copy the config again")
    kind = raw["model_type"]
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"model type {kind!r} is not known to this transformers", how=did_you_mean(str(kind), CONFIG_MAPPING.keys()))
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # each config class checks its values in its own way
        raise UserError(f"the config makes no {kind} model", short(error)) from error


def model_class(config: Any) -> Any:
    """The stock class that a config's `architectures` names, else the causal language model of its type."""
    import transformers

    named = getattr(config, "architectures", None) or []
    if not isinstance(named, (list, tuple)) or not all(isinstance(n, str) for n in named):
        raise UserError("architectures in config.json does not fit", f"it is {shown(named)}", "it must list names of classes")
    for name in named:
        if isinstance(found := getattr(transformers, name, None), type):
            if not isinstance(config, getattr(found, "config_class", None) or object):
                raise UserError(
                    f"config.json names {name} and model type '{config.model_type}'",
                    "they do not belong together",
                    "correct one of the two",
                )
            return found
    for family in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"):  # classes that are registered there alone
        known = getattr(transformers, family)._model_mapping.get(type(config), None)
        if isinstance(known, type) and known.__name__ in named:
            return known
    try:
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"no language model class for model type '{config.model_type}'", "transformers maps none to it") from None


def skeleton(config: Any) -> Any:
    """The stock model of a config on the meta device."""
    cls = model_class(config)
    try:
        with torch.device("meta"):
            return cls._from_config(config)
    except Exception as error:  # a value that no check of the config caught
        raise UserError(f"the config makes no {config.model_type} model", f"{type(error).__name__}: {short(error)}") from error


def disk_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the stock class writes to disk (its own conversion, run on meta tensors)."""
    return _disk_shapes(config.to_json_string(use_diff=False))


@cache
def _disk_shapes(config_json: str) -> dict[str, tuple[int, ...]]:
    from transformers.core_model_loading import revert_weight_conversion

    model = skeleton(config_of(json.loads(config_json)))
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in model.state_dict()}}
    return {n: tuple(t.shape) for n, t in revert_weight_conversion(model, state).items()}


def positions(model: Any) -> int | None:
    """How many positions a model has; None where it has no table of them or does not say."""
    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if not limit and not config.is_encoder_decoder:  # T5 has relative positions, and n_positions says nothing
        limit = getattr(config, "n_positions", None)
    if not limit:
        return None
    for module in model.modules():  # RoBERTa counts its positions from padding_idx + 1
        first = getattr(getattr(module, "position_embeddings", None), "padding_idx", None)
        limit -= 0 if first is None else first + 1
    return int(limit)
