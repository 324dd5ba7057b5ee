"""`check --deep`: what a recipe would meet and make, from configs and a first look at the data; no weights are loaded."""

from dataclasses import replace
from typing import Any

from modelwright import registry
from modelwright.core.data.read import Source
from modelwright.core.knobs import Data
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.certificate import Size
from modelwright.core.model.checkpoint import Checkpoint, config_of, silence_transformers, skeleton
from modelwright.core.model.writer import Blueprint
from modelwright.runner.recipe import Recipe
from modelwright.runner.tune import make_rows


def preview(recipe: Recipe) -> list[dict[str, Any]]:
    """One dictionary for the base and one per step, in order, until a step needs what only a run can make."""
    silence_transformers()
    facts: list[dict[str, Any]] = []
    source = Checkpoint(recipe.base) if recipe.base else None
    if source:
        facts.append({"base": str(source.folder)} | _sizes(source.hf_config, source.bytes()))
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


def _excerpt(document: Any) -> str:
    words = getattr(document, "text", None) or str(document)
    return words[:120].replace("\n", " ") + ("..." if len(words) > 120 else "")
