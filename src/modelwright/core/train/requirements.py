"""What rows ask of a model."""

from typing import Any

import torch

from modelwright.core.data.rows import TokenRows
from modelwright.core.errors import UserError
from modelwright.core.model.classes import positions


def require_positions(model: Any, rows: TokenRows, around: int = 0) -> None:
    """UserError for rows that are, with the tokens put around each, longer than the positions of the model."""
    limit = positions(model)
    if limit and rows.width + around > limit:
        raise UserError(f"context={rows.width + around} is longer than the model's {limit} positions", how="lower train.context")


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether the model keeps two texts of one row apart when it is given their position ids."""
    training, device = model.training, model.device
    model.eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]], device=device) % model.config.get_text_config().vocab_size
    places = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    try:
        together = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, 3:]
    except (TypeError, ValueError):  # it takes no position ids
        return False
    finally:
        model.train(training)
    model.eval()
    alone = model(input_ids=ids[:, 3:], use_cache=False).logits
    model.train(training)
    return torch.allclose(
        together.float(), alone.float(), atol=(1e-4 if alone.dtype == torch.float32 else 3e-2) * float(alone.abs().max() + 1)
    )


def require_apart(model: Any) -> None:
    """UserError unless the model keeps two texts of one row apart."""
    if not keeps_apart(model):
        raise UserError(
            f"{type(model).__name__} mixes the texts of a packed row",
            "it makes no attention mask from position ids",
            "set train.packing: no",
        )
