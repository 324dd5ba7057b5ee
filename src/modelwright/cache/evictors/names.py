"""The ways to evict by name, as recipes and the command line give them."""

from dataclasses import fields
from typing import Any

from modelwright.cache.engine.method import Method
from modelwright.cache.evictors.baselines import H2O, TOVA, KeyNorm, PyramidKV, Random, SnapKV, StreamingLLM
from modelwright.cache.evictors.nacl import NACL
from modelwright.core.errors import UserError, did_you_mean

METHODS: dict[str, type[Method]] = {m.name: m for m in (NACL, SnapKV, H2O, StreamingLLM, TOVA, PyramidKV, KeyNorm, Random)}


def named(name: str, keep: Any = None, tokens: Any = None, settings: dict[str, Any] | None = None, seed: int = 0) -> Method:
    """The method called `name` with its own settings. Raises UserError for an unknown name or setting."""
    if name not in METHODS:
        raise UserError(f"unknown way to evict '{name}'", how=did_you_mean(name, METHODS))
    known = [f.name for f in fields(METHODS[name])]
    given = dict(settings or {})
    for key in given:
        if key not in known or key in ("keep", "tokens"):
            raise UserError(f"{name} has no setting '{key}'", how=did_you_mean(key, [k for k in known if k not in ("keep", "tokens")]))
    if "seed" in known:
        given.setdefault("seed", seed)
    return METHODS[name](tokens=tokens, **({} if keep is None else {"keep": keep}), **given)
