"""reshape.half_reset: each matrix is the tuned or the base model's, exactly; which, follows the draw of tune.hft."""

from typing import Any

import pytest
import torch

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.freeze import halves, units
from modelwright.reshape.half_reset import Knobs, half_reset
from small import same, weights

KINDS = ["llama", "gpt2", "phi3", "gpt_neox", "mixtral", "qwen2"]


def reset(tuned: Any, base: Any, seed: int = 0, **knobs: Any) -> Any:
    return half_reset(Checkpoint(tuned), Knobs(pretrained=str(base), **knobs), seed)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_the_tuned_model_all_is_the_base_and_a_model_reset_to_itself_is_itself(kind: str, tiny: Any) -> None:
    base, tuned = tiny(kind), tiny(kind, seed=1)
    of = {f: weights(Checkpoint(f).model()) for f in (base, tuned)}
    none, every = reset(tuned, base, what="none"), reset(tuned, base, what="all")
    assert same(weights(none.model), of[tuned]) and same(weights(every.model), of[base])
    assert (none.facts["reset share"], none.facts["pieces"], every.facts["reset share"]) == (0.0, 0, 1.0)
    assert same(weights(reset(tuned, tuned).model), of[tuned])


@pytest.mark.parametrize("granularity", ["category", "layer", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_piece_is_exactly_the_one_or_the_others(kind: str, granularity: str, tiny: Any) -> None:
    base, tuned = tiny(kind), tiny(kind, seed=1)
    old, new = (weights(Checkpoint(f).model()) for f in (base, tuned))
    made = reset(tuned, base, seed=4, granularity=granularity)
    got, of, changed = weights(made.model), Anatomy(made.model), 0
    chosen = set(halves(of, 4, granularity))
    for part in of:
        for piece in part.rows or [""]:
            a, b, c = (
                x[part.name].mT
                if part.orientation == "in_out"
                else x[part.name].flatten(0, 1)
                if part.orientation == "experts"
                else x[part.name]
                for x in (got, old, new)
            )
            which = units(part, [piece]) if piece else slice(None)
            back = (part.name, piece) in chosen
            assert torch.equal(a[which], (b if back else c)[which]), (part.name, piece)
            changed += a[which].numel() * back
    assert made.facts["reset share"] == changed / of.total() and made.facts["pieces"] == len(chosen)


def test_draw_follows_the_seed(tiny: Any) -> None:
    base, tuned = tiny("llama"), tiny("llama", seed=1)
    a, b, c = (weights(reset(tuned, base, seed=s).model) for s in (0, 0, 1))
    assert same(a, b) and not same(a, c)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_result_keeps_the_tuned_models_type(dtype: str, tiny: Any) -> None:
    made = reset(tiny("llama", seed=1, dtype=dtype), tiny("llama"))
    assert {str(p.dtype) for p in made.model.parameters()} == {f"torch.{dtype}"}


@pytest.mark.parametrize(("kind", "changes"), [("qwen2", {}), ("llama", {"hidden_size": 64}), ("llama", {"tie_word_embeddings": True})])
def test_another_shape_or_family_is_refused(kind: str, changes: dict[str, Any], tiny: Any) -> None:
    with pytest.raises(UserError, match="other weights"):
        reset(tiny("llama"), tiny(kind, **changes))
