"""Records of stock models through router hooks."""

import pytest
import torch

from families import model_of
from modelwright.core.errors import UserError
from modelwright.core.report.plots import draw
from modelwright.moe.watch import domain_plot, routers, watch


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"])
def test_records_are_the_model_s_own_routing(kind: str) -> None:
    model, ids = model_of(kind), torch.randint(3, 96, (2, 11))
    real = torch.ones(2, 11, dtype=torch.long)
    real[1, 7:] = 0
    with watch(model) as seen:
        model(input_ids=ids, attention_mask=real)
        model(input_ids=ids, attention_mask=real)
    assert seen.counts.sum(1).tolist() == [2 * 2 * 18] * 2
    record = seen.records[1]
    assert record.num_assignments == 36 and record.entropy().shape == (18,)
    hidden = []
    handle = routers(model)[1][1].register_forward_hook(lambda m, a, out: hidden.append(out[2]))
    model(input_ids=ids, attention_mask=real)
    handle.remove()
    assert torch.equal(record.index, hidden[0])
    assert torch.equal(record.counts, hidden[0][real.flatten() > 0].flatten().bincount(minlength=4))
    assert not any(r._forward_hooks for _, r in routers(model) if len(r._forward_hooks) > 1)


def test_a_dense_model_has_no_routers() -> None:
    with pytest.raises(UserError, match="no routers"):
        routers(model_of("llama"))


def test_recomputation_is_counted_once_and_hooks_go() -> None:
    model, ids = model_of("mixtral").train(), torch.randint(3, 96, (2, 11))
    model.gradient_checkpointing_enable()
    before = [len(r._forward_hooks) for _, r in routers(model)]
    with watch(model) as seen:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert seen.counts.sum(1).tolist() == [44, 44]
    assert [len(r._forward_hooks) for _, r in routers(model)] == before and not model._forward_pre_hooks


def test_pictures_draw() -> None:
    model = model_of("mixtral")
    with watch(model) as seen:
        model(input_ids=torch.randint(3, 96, (2, 11)))
    for plot in (*seen.plots(), domain_plot({"prose": seen.counts, "code": seen.counts})):
        assert draw(plot).startswith("<figure>")
    assert 0 <= seen.facts()["MaxVio"] <= 3
