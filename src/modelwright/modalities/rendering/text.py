"""One line of text as a strip of patches, black on white, with a black patch at its end."""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.core.errors import UserError, short

PAD = 3  # white pixels before a text
UNUSED = "\U0010fffd"  # a place that no font fills


def default_font() -> str:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more, but not the scripts of East and South Asia."""
    spec = find_spec("matplotlib")
    assert spec is not None and spec.submodule_search_locations
    return str(Path(next(iter(spec.submodule_search_locations))) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")


class Renderer:
    """Renders with one font of one size; `hash` is that of the font's file. The same font and Pillow give the same pixels."""

    def __init__(self, font: str = "", size: int = 13, patch: int = 16):
        from PIL import ImageFont

        self.path, self.size, self.patch = font or default_font(), size, patch
        try:
            self.hash = hashlib.sha256(Path(self.path).read_bytes()).hexdigest()[:16]
            self.font: Any = ImageFont.truetype(self.path, size)
        except OSError as error:
            raise UserError(f"{self.path} is no font", short(error), "give a TrueType or OpenType file") from None
        self._blank = bytes(self.font.getmask(UNUSED))
        self._known = cache(self._has)
        ascent, descent = self.font.getmetrics()
        self._top = (patch - ascent - descent) // 2

    def _has(self, character: str) -> bool:
        return character.isspace() or not character.isprintable() or bytes(self.font.getmask(character)) != self._blank

    def lacking(self, text: str) -> int:
        """Characters of a text that the font has no glyph for."""
        return sum(not self._known(c) for c in text)

    def line(self, text: str) -> np.ndarray:
        """The patches of one text without the black end: (n, p*p*3) uint8, n = ceil(width / p), at least one."""
        from PIL import Image, ImageDraw

        text = " ".join(text.split())
        width = PAD + int(np.ceil(self.font.getlength(text)))
        n = max(1, -(-width // self.patch))
        image = Image.new("RGB", (n * self.patch, self.patch), "white")
        ImageDraw.Draw(image).text((PAD, self._top), text, fill="black", font=self.font, embedded_color=True)
        pixels = np.asarray(image).reshape(self.patch, n, self.patch, 3)
        return np.ascontiguousarray(pixels.transpose(1, 0, 2, 3)).reshape(n, -1)

    def __call__(self, *texts: str, most: int = 1024) -> tuple[np.ndarray, bool]:
        """One text, or two with a black patch between, and a black patch at the end: (n, p*p*3) uint8, and whether it was cut to `most`."""
        black = np.zeros((1, 3 * self.patch**2), np.uint8)
        parts = [p for t in texts for p in (self.line(t), black)]
        whole = np.concatenate(parts)
        if len(whole) <= most:
            return whole, False
        return np.concatenate([whole[: most - 1], black]), True


def check_script(renderer: Renderer, texts: list[str]) -> int:
    """How many characters the font lacks; UserError where it is more than one in twenty."""
    lacking = sum(map(renderer.lacking, texts))
    if lacking > 0.05 * max(1, sum(map(len, texts))):
        word = next(c for t in texts for c in t if renderer.lacking(c))
        share = f"it lacks {lacking} of {sum(map(len, texts))} characters, {word!r} among them"
        raise UserError(f"{Path(renderer.path).name} does not have the script of this text", share, "give font: a file that does")
    return lacking
