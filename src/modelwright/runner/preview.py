"""`check --deep`: what a recipe would meet and make, from configs and a first look at the data; no weights are loaded."""

from dataclasses import replace
from typing import Any

from modelwright import registry
from modelwright.core.data.read import Source
from modelwright.core.knobs import Data, Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.certificate import Size
from modelwright.core.model.checkpoint import Checkpoint, silence_transformers
from modelwright.core.model.classes import config_of, skeleton
from modelwright.core.model.writer import Blueprint
from modelwright.runner.recipe import Recipe
from modelwright.runner.tune import make_rows


def preview(recipe: Recipe) -> list[dict[str, Any]]:
    """One dictionary for the base and one per step, in order, until a step needs what only a run can make."""
    silence_transformers()
    facts: list[dict[str, Any]] = []
    source = Checkpoint(recipe.base, weights=False) if recipe.base else None
    if source:
        there = {} if source.files else {"note": "no weights are there yet: planned from the config alone"}
        facts.append({"base": str(source.folder)} | _sizes(source.hf_config, source.bytes()) | there)
    known = source
    for i, step in enumerate(recipe.steps):
        fact: dict[str, Any] = {"step": f"{i} {step.entry.name}"}
        data = getattr(step.knobs, "data", None)
        if isinstance(data, Data) and data.path:
            first = Source(replace(data, limit=min(50, data.limit or 50)))
            documents = [d for _, d in first]
            fact["format"] = first.format
            fact["first row"] = _excerpt(documents[0]) if documents else "none"
            if source and hasattr(step.knobs, "train"):
                vocab = int(source.hf_config.get_text_config().vocab_size)
                made = registry.techniques(step.entry, step.knobs), replace(data, limit=min(50, data.limit or 50))
                rows = make_rows(*made, source.tokenizer(), vocab, step.knobs.train, recipe.seed, source.skeleton)
                fact["first tokens"] = rows[0]["input_ids"][:12].tolist()
        if source and hasattr(step.knobs, "train"):
            fact |= _needs(source.hf_config, step.knobs.train)
        if step.entry.family == "reshape" and "checkpoint" in step.entry.takes and known:
            made, promise = registry.load(step.entry)(known, step.knobs, recipe.seed)
            if isinstance(made, Blueprint):
                fact |= {"promise": promise} | made.facts | _sizes(config_of(made.config), 0)
            known = None  # what follows stands on a checkpoint that is not there yet
        facts.append(fact)
    return facts


def _sizes(config: Any, size: int) -> dict[str, Any]:
    model = skeleton(config)
    s = Size.of(Anatomy(model), 2 if "16" in str(config.dtype) else 4)
    width = 2 if "16" in str(config.dtype) else 4
    return {
        "class": type(model).__name__,
        "parameters": f"{s.params_total:,}",
        "active per token": f"{s.params_active:,}",
        "weights": f"{(size or s.params_total * width) / 1e6:,.1f} MB",
        "memory to tune in fp32 with AdamW": f"{s.params_total * 16 / 1e6:,.1f} MB",
        "KV cache per token": f"{s.kv_bytes_per_token:,} bytes",
    }


def _needs(config: Any, train: Train, processes: int = 1) -> dict[str, str]:
    """What training every weight takes in one process; adapters and frozen weights take less."""
    model = skeleton(config)
    n, context = sum(p.numel() for p in model.parameters()), train.context
    shards = {"ddp": 1, "hsdp": max(1, processes // (train.replicas or 1))}.get(train.strategy, processes)
    held = 4 if train.weights == "fp32" else 2
    moments = {"adafactor": 0.1, "sgd": 0.0, "adamw_8bit": 2.0}.get(train.optimizer, 4.0 if train.states == "bf16" else 8.0)
    text = config.get_text_config()
    width, layers = int(getattr(text, "hidden_size", 0) or 0), int(getattr(text, "num_hidden_layers", 0) or 0)
    tokens = train.batch * context
    activations = tokens * width * 4 * (layers * (2 if train.gradient_checkpointing else 34) + 34)  # 34 values of d a block (2205.05198)
    logits = min(tokens * int(text.vocab_size), 1 << 25) * 4 * 3
    parts = {"weights": n * held / shards, "gradients": n * held / shards, "optimizer": n * moments / shards}
    parts |= {"activations, about": activations, "logits of a chunk": logits}
    flops = Anatomy(model).flops_per_token(context) * 3 * tokens * train.accumulate
    told = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
    return {"memory of one process": f"{sum(parts.values()) / 1e9:.2f} GB ({told})", "FLOPs of one step": f"{flops:.3g}"}


def _excerpt(document: Any) -> str:
    words = getattr(document, "text", None) or str(document)
    return words[:120].replace("\n", " ") + ("..." if len(words) > 120 else "")
