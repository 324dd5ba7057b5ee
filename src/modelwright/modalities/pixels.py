"""A Llama that reads text as pixels: no vocabulary, any script that its font has, and letters that look alike are alike.

When to use it: noisy text, typos and look-alike letters, scripts that a tokenizer splits badly; or to see what pixels add to tokens.

Paper: Autoregressive Pre-Training on Pixels and Texts (PixelGPT, MonoGPT, DualGPT; arXiv 2404.10710), code ernie-research/pixelgpt.

    a line of text, 16 pixels high -> patches x_1 .. x_n, then a black patch; the causal decoder gives h_i
    pixel   L = mean over real patches of |W h_i - t_{i+1}|^2 / 768        t: the patch, normalised
    text    cross-entropy of tokens
    pair    patches and then tokens of the same text in one sequence, both losses 1:1
    mono    some rows as patches, others as tokens, both losses 1:1 (MonoGPT); the paper's DualGPT mixes text, pixel and pair

The base is a Llama; its weights are kept under their names (models/pixels.py), patches get an embedding and a head of their own, and text
alone goes through as before. A base that is a pixel model already is trained on. `task: classify` puts a classifier on the last place of
`regime` (pixel, text, pair): columns text and label; how many are right is among the evaluations.

The paper's targets are patches normalised one by one. A black patch and a white one are then both zero, so that the end of a text cannot
be predicted; `targets: mended`, the default, gives patches of one colour their colour back, `normalised` is the paper's, `plain` learns
pixels as they are. The official code renders with another font (Go Noto) in another library; the figures of such models depend on the
font, so its hash is kept in config.json and a base that was trained with another font is refused. No text has colours here but emoji.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.core.data.read import read
from modelwright.core.data.tables import column, table
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, Train, Tune, knob
from modelwright.core.train.technique import LossTerm, Technique
from modelwright.modalities.rendering.rows import PixelObjective, PixelRows, TokenTerm
from modelwright.modalities.rendering.text import Renderer, check_script
from modelwright.models.pixels import PixelLlamaForCausalLM, unpatchify


@dataclass(frozen=True)
class Knobs(Tune):
    regime: Literal["pixel", "text", "pair", "mono"] = knob("pixel", "what a row is: patches, tokens, both, or one or the other in turn")
    task: Literal["next", "classify"] = knob("next", "predict what follows, or the class of a text (columns text and label)")
    targets: Literal["mended", "normalised", "plain"] = knob("mended", "what the pixel head learns; the paper: normalised")
    patch: int = knob(16, "pixels of a patch's side", low=4, high=64)
    font: str = knob("", "TrueType font; empty: DejaVu Sans, which comes with matplotlib", path=True)
    font_size: int = knob(13, "pixels; the paper's 8 points at 120 dots per inch", low=4)
    patches: int = knob(128, "patches of a text at most, the black one included; what is longer is cut and counted", low=4)


class Pixels(Technique):
    """Another class of model, its rows and its objective."""

    name = "pixels"
    same_kind = False

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.classes: list[str] = []
        self.renderer = Renderer(knobs.font, knobs.font_size, knobs.patch)

    def load(self, source: Any, dtype: Any) -> Any:
        """The base with eyes; UserError where it is no Llama or has learnt another font."""
        k, config = self.knobs, source.hf_config
        if config.model_type not in ("llama", "pixel_llama"):
            raise UserError(f"the base is a {config.model_type}", "patches are read by a Llama", "give a Llama, or a model that this made")
        settings: dict[str, Any] = {}
        if config.model_type == "pixel_llama":
            known, now = (config.patch_size, config.font_size, config.font_hash), (k.patch, k.font_size, self.renderer.hash)
            if known != now:
                what = f"the base was trained on patches of {known[0]} pixels, font {config.font} of size {known[1]} ({known[2]})"
                raise UserError(what, f"these settings give {now[0]}, size {now[1]} ({now[2]})", "give the same font and sizes")
            settings["num_classes"] = config.num_classes
        else:
            settings |= {"patch_size": k.patch, "font_size": k.font_size}
            settings |= {"font": Path(self.renderer.path).name, "font_hash": self.renderer.hash}
        if k.task == "classify":
            self.classes = sorted({str(v) for v in self._labels(k.data)})
            if len(self.classes) < 2:
                raise UserError(f"'label' of {k.data.path} has one value", "there is nothing to tell apart", "give two classes or more")
            settings["num_classes"] = len(self.classes)
        torch.manual_seed(0)
        model = PixelLlamaForCausalLM.from_llama(source.model(dtype), pixel_targets=k.targets, **settings)
        if k.task == "classify":
            model.config.id2label, model.config.label2id = dict(enumerate(self.classes)), {c: i for i, c in enumerate(self.classes)}
        return model

    def objective(self, model: Any, tokenizer: Any, train: Train, seed: int) -> Any:
        k = self.knobs
        return PixelObjective(model, tokenizer, seed, k.targets, k.task == "classify", bool(self.terms()))

    def terms(self) -> list[LossTerm]:
        return [TokenTerm()] if self.knobs.task == "next" and self.knobs.regime in ("pair", "mono") else []

    def select(self, model: Any, anatomy: Any, seed: int) -> None:
        """Weights that the regime has no use for stand still."""
        k = self.knobs
        unused = {"lm_pixel_head"} if k.task == "classify" or k.regime == "text" else set()
        unused |= {"patch_embed"} if k.regime == "text" else set()
        tokens = k.regime == "pixel"
        for name, p in model.named_parameters():
            if name.split(".")[0] in unused or tokens and ("embed_tokens" in name or name.startswith("lm_head")):
                p.requires_grad_(False)
            if name.startswith("lm_head") and k.task == "classify":
                p.requires_grad_(bool(model.config.tie_word_embeddings) and not tokens)

    def _labels(self, data: Data) -> list[Any]:
        if not data.path:
            raise UserError("no data was given", "a table with the columns text and label is needed", "give data: {path: FILE}")
        return column(data.path, table(Path(data.path)), "label")[: data.limit]

    def _texts(self, data: Data) -> list[str]:
        if self.knobs.task == "classify":
            assert data.path
            return [str(v) for v in column(data.path, table(Path(data.path)), data.column or "text")[: data.limit]]
        if not data.path and not data.sources:
            raise UserError("no data was given", how="give data: {path: FILE}")
        found = read(data)
        if not isinstance(found[0], str):
            raise UserError(f"{data.path} holds no plain text", "lines of text are rendered", "give text, or a table with a column of text")
        return [line for text in found for line in text.splitlines() if line.strip()]

    def rows(self, data: Data, tokenizer: Any, vocab: int, train: Train, seed: int) -> PixelRows:
        """Texts as patches, tokens or both. What is cut, and characters that the font lacks, are counted."""
        k, texts = self.knobs, self._texts(data)
        kinds = self._kinds(data) if k.task == "classify" else [0] * len(texts)
        if k.regime != "pixel" and tokenizer is None:
            raise UserError("the base has no tokenizer", f"regime {k.regime} has tokens", "add tokenizer files, or take regime: pixel")
        seen: list[Tensor] = []
        said: list[Tensor] = []
        cut = cut_tokens = 0
        lacking = check_script(self.renderer, texts) if k.regime != "text" else 0
        nothing = torch.zeros(0, 3 * k.patch**2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int32)
        for i, text in enumerate(texts):
            patches, ids = nothing
            if k.regime in ("pixel", "pair") or k.regime == "mono" and i % 2 == 0:
                drawn, short = self.renderer(text, most=k.patches)
                patches, cut = torch.from_numpy(drawn), cut + short
            if k.regime in ("text", "pair") or k.regime == "mono" and i % 2:
                whole = list(tokenizer(text)["input_ids"])
                cut_tokens += len(whole) > train.context
                ids = torch.tensor(whole[: train.context], dtype=torch.int32)
            seen.append(patches)
            said.append(ids)
        facts = {"rows": len(texts), "patches": sum(map(len, seen)), "text tokens": sum(map(len, said)), "cut at patches": cut,
                 "cut at the context": cut_tokens, "characters that the font lacks": lacking, "font": self.renderer.hash}  # fmt: skip
        return PixelRows(seen, said, kinds, facts)

    def _kinds(self, data: Data) -> list[int]:
        values = [str(v) for v in self._labels(data)]
        if new := sorted(set(values) - set(self.classes)):
            raise UserError(f"{data.path} has the label {new[0]!r}", f"{', '.join(self.classes)} were learnt", "correct the table")
        return [self.classes.index(v) for v in values]

    def facts(self) -> dict[str, Any]:
        return {"classes": ", ".join(self.classes)} if self.classes else {}


@torch.no_grad()
def generate(model: Any, patches: Tensor, most: int = 32) -> tuple[Tensor, bool]:
    """Patches that follow patches (P, 3pp) in [0, 1], until a black one or `most`; and whether the black one came. One causal pass a patch.

    Targets that were normalised patch by patch have lost brightness and contrast: they are shown from the lowest to the highest value."""
    how, found = model.config.pixel_targets, [patches]
    for _ in range(most):
        out = model(patches=torch.cat(found)[None]).pixels[0, -1].float()
        level = float(out.mean()) if how == "plain" else float((out.mean() + 1) / 2)
        if how != "normalised" and level < 0.25:
            found.append(torch.zeros_like(patches[:1]))
            return torch.cat(found), True
        spread = (out - out.min()) / (out.max() - out.min()).clamp(min=1e-6)
        found.append((out.clamp(0, 1) if how == "plain" else torch.ones_like(out) if float(out.std()) < 0.1 else spread)[None].to(patches))
    return torch.cat(found), False


def image_of(patches: Tensor, size: int) -> Any:
    """One strip as a picture of Pillow."""
    from PIL import Image

    strip = unpatchify(patches.float().cpu(), size, len(patches) * size)
    return Image.fromarray((strip * 255).round().clamp(0, 255).byte().numpy())


METHOD = Pixels
