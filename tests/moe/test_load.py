"""Expert load against what the router itself says."""

import pytest
import torch

from modelwright.core.data.rows import IGNORE, Rows
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.moe.load import divergence, expert_load, max_violation

KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"]


@pytest.mark.parametrize("kind", KINDS)
def test_load_counts_what_the_router_chose_and_no_padding(kind: str, tiny) -> None:
    model = Checkpoint(tiny(kind)).model()
    ids = torch.randint(3, 96, (3, 12))
    lengths = torch.tensor([12, 7, 9])
    rows = Rows(ids.int(), torch.where(torch.arange(12) < lengths[:, None], ids, IGNORE).int(), lengths)
    mask = (torch.arange(12) < lengths[:, None]).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    want = torch.stack(
        [torch.bincount(layer.view(3, 12, -1)[mask.bool()].topk(2).indices.flatten(), minlength=4) for layer in logits]
    ).float()
    torch.testing.assert_close(expert_load(model, rows), want / want.sum(1, keepdim=True))


def test_max_violation_is_zero_when_even_and_e_minus_one_when_collapsed() -> None:
    load = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]])
    assert max_violation(load).tolist() == [0.0, 3.0]


def test_divergence_of_the_released_drop_upcycling_counts(shared) -> None:
    """Mean over 24 layers of the divergence between 5 domains, from the counts that the authors released."""
    import csv
    from collections import defaultdict

    counts: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(5, 24, 8))
    domains: dict[str, int] = {}
    with open(shared / "drop_upcycling_routing" / "expert_counts.csv") as file:
        for row in csv.DictReader(file):
            d = domains.setdefault(row["domain"], len(domains))
            counts[row["model"]][d, int(row["layer"]), int(row["expert"])] = float(row["token_assignments"])
    found = {model: round(float(divergence(c).mean()), 3) for model, c in counts.items()}
    assert sorted(found.values()) == [0.011, 0.359, 0.404], found


def test_divergence_is_zero_for_equal_domains_and_log2_n_for_disjoint_ones() -> None:
    same = torch.rand(1, 3, 8).expand(4, 3, 8)
    assert divergence(same).abs().max() < 1e-12
    assert divergence(torch.eye(4).view(4, 1, 4)).tolist() == [2.0]
