"""Spoken digits from text: does guidance make clips say what was asked, and what does it cost in diversity? Tags beside free text.

Three speakers of the Free Spoken Digit Dataset at 4 kHz, 2,048 samples a clip; 350 steps of 16 clips. Tags are the digit's name with a
learnt embedding, free text is four templates through the frozen seedling. The judge is a support vector machine on log spectra, trained on
real clips.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from common import SHARED, Cache, Clock, save, spread
from modelwright.core.knobs import Train
from modelwright.core.model.checkpoint import SEEDLING, Checkpoint
from modelwright.core.train.loop import fit
from modelwright.modalities.music import _told, sample
from modelwright.modalities.sound import waves as w
from modelwright.modalities.sound.diffusion import Average, Diffusion, WaveRows
from modelwright.models.music import WaveUNet, WaveUNetConfig

SEEDS, RATE, LENGTH, STEPS, GUIDANCE = [0, 1, 2], 4000, 2048, 350, (1.0, 3.0, 6.0)
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["the digit {}", "someone says {}", "a voice that says the number {}", "{}"]
SPEAKERS = ("jackson", "theo", "nicolas")


def clips() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Real clips, their digits, and which are kept for the judge's test (the last two of each speaker and digit)."""
    files = [f for f in sorted((SHARED / "audio_fsdd").glob("*.wav")) if f.stem.split("_")[1] in SPEAKERS]
    waves, digits, held = [], [], []
    for f in files:
        x, rate, _ = w.read_wave(f)
        x = w.resampled(x, rate, RATE)[:LENGTH]
        x = np.pad(x, (0, LENGTH - len(x)))
        waves.append(x / np.sqrt((x**2).mean()))
        digits.append(int(f.stem.split("_")[0]))
        held.append(int(f.stem.split("_")[2]) >= 10)
    return np.stack(waves).astype(np.float32), np.array(digits), np.array(held)


def judge(x: np.ndarray, y: np.ndarray):
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = make_pipeline(StandardScaler(), SVC(C=10)).fit(features(x), y)
    return lambda z: model.predict(features(z))


def features(x: np.ndarray) -> np.ndarray:
    return w.log_spectra(x, 128).reshape(len(x), -1)


def run(kind: str, seed: int) -> dict:
    torch.set_num_threads(1)
    waves, digits, held = clips()
    x, y = waves[~held], digits[~held]
    decide = judge(x, y)
    rng = np.random.default_rng(seed)
    source = Checkpoint(SEEDLING) if kind == "free text" else None
    templates = TEMPLATES if source else TEMPLATES[3:]
    prompts = [t.format(d) for d in DIGITS for t in templates]
    told, width, words = _told(source, prompts)
    chosen = [len(templates) * d + int(rng.integers(len(templates))) for d in y]
    torch.manual_seed(seed)
    model = WaveUNet(WaveUNetConfig(widths=[32, 48, 64], stem=8, text_width=width, words=len(words), rate=RATE, length=LENGTH))
    average = Average(0.99)
    train = Train(epochs=STEPS * 16 / len(x), batch=16, lr=1.5e-3, schedule="cosine", record=False)
    rows = WaveRows(torch.from_numpy(x), chosen, told, {})
    with tempfile.TemporaryDirectory() as folder, Clock() as clock:
        out = fit(
            model, rows, train, techniques=[average], evals={}, folder=Path(folder), seed=seed, objective=Diffusion(model, seed, 0.15)
        )
        model = average.export(out.model, folder).eval()
    asked = np.repeat(np.arange(10), 10)
    states = [told[len(templates) * d] for d in asked]
    found = {"cpu": clock.cpu, "real": float((decide(waves[held]) == digits[held]).mean())}
    found["real diversity"] = w.diversity(x, [str(d) for d in y])
    for g in GUIDANCE:
        z = sample(model, states, length=LENGTH, guidance=g, steps=20, seed=seed).numpy()
        found[f"accuracy {g:g}"] = float((decide(z) == asked).mean())
        found[f"diversity {g:g}"] = w.diversity(z, [str(d) for d in asked])
    return found


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cache = Cache("music")
    found = {k: [cache([k, s], lambda k=k, s=s: run(k, s)) for s in SEEDS] for k in ("tags", "free text")}
    rows = []
    for kind, runs in found.items():
        for g in GUIDANCE:
            rows.append([kind, f"{g:g}", *(spread([r[f"{what} {g:g}"] for r in runs]) for what in ("accuracy", "diversity"))])
    first = found["tags"][0]
    rows.append(["real clips not learnt from", "", f"{first['real']:.3g}", f"{first['real diversity']:.3g}"])
    rises = {k: sum(r["accuracy 1"] < r["accuracy 3"] < r["accuracy 6"] for r in v) for k, v in found.items()}
    falls = {k: sum(r["diversity 1"] > r["diversity 3"] > r["diversity 6"] for r in v) for k, v in found.items()}
    save(
        "music",
        claim="the share of clips that say the digit asked for rises with guidance and is above chance; diversity falls",
        outcome="accuracy rises from each guidance to the next in "
        + ", ".join(f"{n} of 3 seeds ({k})" for k, n in rises.items())
        + "; diversity falls in "
        + ", ".join(f"{n} of 3 ({k})" for k, n in falls.items()),
        columns=["prompts", "guidance", "accuracy of the judge (chance .1)", "diversity within a digit"],
        rows=rows,
        seeds=SEEDS,
        notes=[f"{spread([r['cpu'] for v in found.values() for r in v])} CPU seconds to train one model"],
    )


if __name__ == "__main__":
    main()
