"""Reward calibration of 300,000 scores beside plain statsmodels and the published window's loop, in one run."""

import bisect
import subprocess
import sys
import time
import tracemalloc

import numpy as np

from common import save, spread
from modelwright.reward.calibrate import Calibrator
from modelwright.reward.table.scores import pairs

SEEDS = [0, 1, 2]
LOOPED = 200  # pairs that the published loop is timed on; its cost per pair is constant


def scores(n: int, seed: int, whole: bool):
    """n scores of n / 2 pairs; lengths in whole characters, as texts have, or all different."""
    rng = np.random.default_rng(seed)
    length = np.exp(rng.normal(7, 0.8, n))
    length = np.round(length) if whole else length
    score = rng.normal(0, 1, n) + 2 * np.tanh(length / 1500)
    half = n // 2
    return pairs("x", score[:half], score[half:], {"length": (length[:half], length[half:])})


def cpu(function) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def fit_and_apply(s, **settings) -> np.ndarray:
    return Calibrator(**settings).fit(s.score, s.features, s.group).apply(s.score, s.features, s.group)


def statsmodels_lowess(s, frac: float, delta: float) -> np.ndarray:
    """What a user of statsmodels writes: fit, and the fitted value of each row."""
    from statsmodels.nonparametric.smoothers_lowess import lowess

    length = s.features["length"]
    return s.score - lowess(s.score, length, frac=frac, delta=delta, return_sorted=False)


def published_window(s, rows: int) -> float:
    """CPU seconds for all pairs of the published per-row loop, from `rows` of them; ratio 4, at least 20 scores."""
    import pandas as pd

    length, n = s.features["length"], len(s.better)
    table = pd.DataFrame({"fc": length[:n], "fr": length[n:], "sc": s.score[:n], "sr": s.score[n:]})
    half = (table.fc - table.fr).abs().mean() / 4
    began = time.process_time()
    pool = []
    for i in range(rows):
        d = table.iloc[i]
        pool += [(d["fc"], d["sc"]), (d["fr"], d["sr"])]
    made = (time.process_time() - began) / rows
    pool = sorted(zip(length.tolist(), s.score.tolist(), strict=True), key=lambda x: x[0])
    xs, ys = [x for x, _ in pool], [y for _, y in pool]
    began = time.process_time()
    for i in range(rows):
        d = table.iloc[i]
        a, b = (ys[bisect.bisect_left(xs, f - half) : bisect.bisect_right(xs, f + half) - 1] for f in (d["fc"], d["fr"]))
        if len(a) >= 20 and len(b) >= 20:
            d["sc"] - np.mean(a), d["sr"] - np.mean(b)
    return (made + (time.process_time() - began) / rows) * n


def memory(n: int) -> float:
    """Peak MiB of fitting and applying both methods to n scores."""
    s = scores(n, 0, whole=False)
    tracemalloc.start()
    for settings in ({"frac": 1.0}, {"method": "mean"}):
        fit_and_apply(s, **settings)
    return tracemalloc.get_traced_memory()[1] / 2**20


def curves() -> tuple[list[list], list[float]]:
    """Rows of locally weighted regression beside statsmodels, and how many times as fast each is."""
    rows, ratios = [], []
    warm = scores(3_000, 0, whole=True)
    fit_and_apply(warm), statsmodels_lowess(warm, 0.5, 1.0)  # the first call imports
    for whole, kind in ((True, "whole characters"), (False, "all different")):
        for frac in (0.3, 1.0):
            ours, theirs, apart = [], [], []
            for seed in SEEDS:
                s = scores(300_000, seed, whole)
                delta = 0.01 * float(np.ptp(s.features["length"]))
                results: list[np.ndarray] = []
                ours.append(cpu(lambda s=s, r=results, d=delta, q=frac: r.append(fit_and_apply(s, frac=q, delta=d))))
                theirs.append(cpu(lambda s=s, r=results, d=delta, q=frac: r.append(statsmodels_lowess(s, q, d))))
                apart.append(float(np.abs(results[0] - results[1]).max()))
            ratios.append(float(np.median(theirs) / np.median(ours)))
            name, beside = f"LWR, frac {frac}, {kind}", "statsmodels, delta 1 % of the range"
            rows.append([name, beside, spread(ours), spread(theirs), ratios[-1], f"differ by {max(apart):.1e}"])
        default = [cpu(lambda s=s: fit_and_apply(s, frac=1.0)) for s in (scores(300_000, seed, whole) for seed in SEEDS)]
        remark = "finer: 1 % of the middle 98 % of the lengths"
        rows.append([f"LWR, frac 1.0, {kind}, delta by default", "", spread(default), "", "", remark])
    return rows, ratios


def windows() -> tuple[list[list], float, float]:
    """Rows of the window beside the published loop, and how many times faster it is at 300,000 and at 6,000 scores."""
    ours, theirs = [], []
    for seed in SEEDS:
        s = scores(300_000, seed, whole=True)
        ours.append(cpu(lambda s=s: fit_and_apply(s, method="mean")))
        theirs.append(published_window(s, LOOPED))
    large = float(np.median(theirs) / np.median(ours))
    remark = f"loop timed on {LOOPED} pairs, scaled to all"
    rows = [["window, 300,000", "the published loop", spread(ours), spread(theirs), large, remark]]
    s = scores(6_000, 0, whole=True)
    ours = [cpu(lambda: fit_and_apply(s, method="mean")) for _ in range(5)]
    theirs = [published_window(s, 3_000) for _ in range(3)]
    small = float(np.median(theirs) / np.median(ours))
    rows.append(["window, 6,000 (RewardBench's size)", "the published loop, whole", spread(ours), spread(theirs), small, ""])
    return rows, large, small


def peak(n: int) -> float:
    """Peak MiB at n scores, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, str(n)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    curve_rows, ratios = curves()
    window_rows, large, small = windows()
    half, whole = peak(150_000), peak(300_000)
    memory_row = ["peak memory, 150,000 and 300,000, MiB", "", f"{half:.0f}", f"{whole:.0f}", whole / half, "linear: 2"]
    save(
        "calibrate",
        claim="300,000 scores are fitted and applied no slower than by statsmodels' lowess with delta, and at least 20 times faster than "
        "by the published window's per-row loop; memory is linear.",
        outcome=f"LWR is {min(ratios):.2f} to {max(ratios):.1f} times as fast as statsmodels (below 1: slower, where all features "
        f"differ); the window is {large:,.0f} times faster than the loop at 300,000 scores and {small:,.0f} times at 6,000; twice the "
        f"scores take {whole / half:.2f} times the memory.",
        columns=["task", "beside", "CPU seconds, ours", "CPU seconds, theirs", "theirs / ours", "remark"],
        rows=[*curve_rows, *window_rows, memory_row],
        seeds=SEEDS,
        notes=["medians over seeds with their range, one thread; reading and writing files is not counted"],
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(memory(int(sys.argv[1])))
    else:
        main()
