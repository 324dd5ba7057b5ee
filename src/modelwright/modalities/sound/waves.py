"""Wave files in and out with Python's own module: any rate and width, stereo mixed down, what is changed counted."""

import base64
import html
import io
import math
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.data.tables import column, table
from modelwright.core.errors import UserError, short

LOUDNESS = 0.1  # root mean square of what is written


def read_wave(file: Path) -> tuple[np.ndarray, int, int]:
    """Samples (n,) in [-1, 1], the rate, and the channels that were mixed down. UserError where it is no PCM wave file."""
    try:
        with wave.open(str(file), "rb") as f:
            channels, width, rate, raw = f.getnchannels(), f.getsampwidth(), f.getframerate(), f.readframes(f.getnframes())
    except FileNotFoundError:
        raise UserError(f"no file at {file}", how="check the paths of the table") from None
    except (OSError, wave.Error, EOFError) as error:
        raise UserError(f"{file} is no PCM wave file", short(error), "convert it to 16-bit wav") from None
    if width == 1:
        x = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        x = (np.frombuffer(b"".join(b"\0" + raw[i : i + 3] for i in range(0, len(raw), 3)), "<i4") / 2**31).astype(np.float32)
    else:
        x = (np.frombuffer(raw, f"<i{width}") / 2 ** (8 * width - 1)).astype(np.float32)
    return x.reshape(-1, channels).mean(1), rate, channels


def resampled(x: np.ndarray, given: int, rate: int) -> np.ndarray:
    """Another rate, by a polyphase filter."""
    from scipy.signal import resample_poly

    shared = math.gcd(given, rate)
    return resample_poly(x, rate // shared, given // shared).astype(np.float32)


def read_clips(path: str, audio: str, text: str, rate: int, length: int) -> tuple[np.ndarray, list[str], dict[str, Any], int]:
    """Clips (n, length) of mean square 1 with their prompts. Counted: resampled, mixed down, cropped, padded; left out are clips of less
    than an eighth of the length, and silent ones."""
    at = Path(path)
    whole = table(at)
    files, prompts = ([str(v) for v in column(path, whole, c)] for c in (audio, text))
    told: Counter[str] = Counter()
    clips, kept = [], []
    for name, prompt in zip(files, prompts, strict=True):
        x, given, channels = read_wave(at.parent / name)
        rate = rate or given
        told["mixed down from stereo"] += channels > 1
        if given != rate:
            told[f"resampled to {rate} Hz"] += 1
            x = resampled(x, given, rate)
        if len(x) < length / 8:
            told["left out: shorter than an eighth of the length"] += 1
            continue
        longer, shorter = len(x) > length, len(x) < length
        x = x[:length] - x[:length].mean()
        level = float(np.sqrt((x**2).sum() / length))
        if level < 1e-5:
            told["left out: silent"] += 1
            continue
        told["cropped"] += longer
        told["padded with silence"] += shorter
        clips.append(np.pad(x, (0, length - len(x))) / level)
        kept.append(prompt)
    if len(clips) < 2:
        why = "; ".join(f"{k}: {v}" for k, v in told.items() if v)
        raise UserError(f"{path} has {len(clips)} usable clips", why, "lower length (samples), or give more clips")
    return np.stack(clips).astype(np.float32), kept, {"clips": len(clips), **{k: v for k, v in told.items() if v}}, rate


def wav_bytes(x: np.ndarray, rate: int) -> tuple[bytes, bool]:
    """A 16-bit wave file of one loudness, and whether it had to be quieter so that nothing is clipped."""
    x = x * LOUDNESS / max(float(np.sqrt((x**2).mean())), 1e-9)
    peak = float(np.abs(x).max())
    quiet = peak > 0.99
    x = x * (0.99 / peak) if quiet else x
    out = io.BytesIO()
    with wave.open(out, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes(np.round(x * 32767).astype("<i2").tobytes())
    return out.getvalue(), quiet


def player(clips: list[tuple[str, bytes]], title: str) -> str:
    """One page that plays the clips; nothing is loaded from elsewhere."""
    rows = []
    for name, data in clips:
        source = f"data:audio/wav;base64,{base64.b64encode(data).decode()}"
        rows.append(f'<tr><td>{html.escape(name)}</td><td><audio controls preload="none" src="{source}"></audio></td></tr>')
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    style = "<style>body{font-family:sans-serif;margin:2em}td{padding:.2em 1em}</style>"
    return f"{head}{style}<h1>{html.escape(title)}</h1><table>{''.join(rows)}</table></html>\n"


def log_spectra(x: np.ndarray, frame: int = 256) -> np.ndarray:
    """Mean log magnitude in 32 bands over time: (n, frames, 32), for distances between clips."""
    n = x.shape[1] // frame * frame
    frames = x[:, :n].reshape(len(x), -1, frame) * np.hanning(frame)
    power = np.abs(np.fft.rfft(frames))[..., 1:] ** 2
    bands = power.reshape(*power.shape[:2], 32, -1).mean(-1)
    return np.log(bands + 1e-3)


def diversity(x: np.ndarray, prompts: list[str]) -> float:
    """The standard deviation of log spectra among clips of one prompt, averaged over prompts with two clips or more."""
    spectra = log_spectra(x)
    groups = [[i for i, p in enumerate(prompts) if p == one] for one in dict.fromkeys(prompts)]
    found = [float(spectra[g].std(0).mean()) for g in groups if len(g) > 1]
    return float(np.mean(found)) if found else 0.0
