"""Rows of ranked pairs: two answers to one prompt."""

from typing import Any

import numpy as np
import torch

from modelwright.core.data.store import StoredRows


class PairRows(StoredRows):
    """Row i: chosen (T,) and rejected (T',) ids with their prompt, where each answer begins, the length of the longer, example_id.

    The documents of its store stand in twos.
    """

    def __getitem__(self, i: int) -> dict[str, Any]:
        assert self.bins is not None
        if not 0 <= i < len(self):
            raise IndexError(i)
        (chosen, a), (rejected, b) = (self.document(d) for d in self.bins[i])
        return {
            "chosen": torch.from_numpy(chosen),
            "rejected": torch.from_numpy(rejected),
            "chosen_from": int(np.argmax(a)),
            "rejected_from": int(np.argmax(b)),
            "length": torch.tensor(max(len(chosen), len(rejected))),
            "example_id": i,
        }
