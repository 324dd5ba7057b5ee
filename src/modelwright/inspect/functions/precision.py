"""Average precision of all neurons at once.

AP = sum over thresholds of (recall step) * precision, thresholds being the different values of the score: a group of ties
counts at the precision of its last row, as in scikit-learn. Predictivity (arXiv 2305.18390) is max(AP(labels), AP(1 - labels)).

The label is put into the lowest bit of the sort key, so one sort of whole numbers orders scores and labels together.
For scores that are not negative (activations after a ReLU) a key has 32 bits.
"""

import numpy as np

_BLOCK = 1 << 16  # values at a time: they stay in the cache


def average_precision(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AP of each column of `scores` (n, F) for the labels (n,) bool, and for their opposite: twice (F,)."""
    labels = np.asarray(labels, bool)
    n, positive = len(labels), int(labels.sum())
    if not 0 < positive < n:
        raise ValueError("both labels are needed")
    scores = np.asarray(scores)
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    step = max(1, _BLOCK // n)  # a narrow copy first: turning it is fast, turning columns of the wide table is not
    parts = [_block(scores[:, i : i + step].copy().T.copy(order="C"), labels, positive) for i in range(0, scores.shape[1], step)]
    return np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts])


def predictivity(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """max(AP(labels), AP(1 - labels)) of each column (F,). Chance is the larger share of the two labels, not one half."""
    return np.maximum(*average_precision(scores, labels))


def _block(x: np.ndarray, labels: np.ndarray, positive: int) -> tuple[np.ndarray, np.ndarray]:
    """The two APs of rows of x (f, n), which is changed.

    In rising order let p_i be the place of the i-th positive. It has P - i positives and n - p_i scores from there on, so with
    v[j] = 1 / (n - j) its precision is (P - i) v[p_i]. The precisions of ALL places add up to the sum over i of V[p_i], V being
    the running sum of v; the negatives' precisions, with 1 - precision in place of precision, follow from the two sums.
    """
    n = x.shape[1]
    x += 0.0  # -0.0 becomes 0.0
    key = _keys(x)
    key |= labels.astype(key.dtype)
    key.sort(1)
    tied = (key[:, 1:] ^ key[:, :-1]) <= 1  # equal scores, whatever their labels
    lowest = np.where(tied.all(1), n, tied.argmin(1) + 1)  # how many share the lowest score: zeros after a ReLU
    if int(tied.sum()) > int((lowest - 1).sum()):
        return _with_ties(key, tied, positive)
    place = np.flatnonzero((key & 1).astype(bool)).reshape(len(key), positive)
    place -= np.arange(0, key.size, n)[:, None]
    v = 1.0 / np.arange(n, 0, -1)
    each, total, left = v[place], np.cumsum(v), np.arange(positive, 0, -1.0)
    if (lowest == 1).all():
        hit, whole = each @ left, total[place].sum(1)
    else:  # the ties all count at the precision of the first place, P / n
        among = place < lowest[:, None]
        hit = np.where(among, 0.0, each) @ left + among.sum(1) * (positive / n)
        whole = np.where(among, 0.0, total[place] - total[lowest - 1][:, None]).sum(1) + lowest * (positive / n)
    return hit / positive, (n - positive - whole + hit) / (n - positive)


def _with_ties(key: np.ndarray, tied: np.ndarray, positive: int) -> tuple[np.ndarray, np.ndarray]:
    """The same where any scores may be equal: a group of ties counts at its lowest place."""
    n = key.shape[1]
    label = (key & 1).astype(np.float64)
    precision = (positive - np.cumsum(label, 1) + label) / np.arange(n, 0, -1)
    start = np.zeros(key.shape, np.int32)
    start[:, 1:] = np.where(tied, 0, np.arange(1, n, dtype=np.int32))
    precision = np.take_along_axis(precision, np.maximum.accumulate(start, 1), 1)
    hit = np.einsum("ij,ij->i", precision, label)
    return hit / positive, (n - positive - precision.sum(1) + hit) / (n - positive)


def _keys(x: np.ndarray) -> np.ndarray:
    """Whole numbers in the order of x, their lowest bit free."""
    if x.dtype == np.float32 and float(x.min(initial=0)) >= 0:
        return x.view(np.uint32) << 1
    if x.dtype == np.float32:
        bits = x.view(np.uint32).astype(np.uint64)
        return np.where(bits >> 31, np.uint64(0xFFFFFFFF) - bits, bits + np.uint64(1 << 31)) << np.uint64(1)
    # 64 bits leave none free: ranks take the place of the values
    order = np.argsort(x, 1, kind="stable")
    ordered = np.take_along_axis(x, order, 1)
    rank = np.zeros(x.shape, np.uint32)
    rank[:, 1:] = np.cumsum(ordered[:, 1:] != ordered[:, :-1], 1)
    key = np.empty_like(rank)
    np.put_along_axis(key, order, rank, 1)
    return key << 1
