"""A 1-D U-Net over raw samples that is told a time and a text, as a transformers model: "wave_unet" (after ERNIE-Music, arXiv 2302.04456).

    import modelwright.models                          # registers the class

    wave (B, L) -> stem, stride s0 -> levels: residual block, stride 4 -> transformer blocks at the deepest -> the way back up with skips
    residual blocks      scaled and shifted by e = time features + the text's summary
    transformer blocks   queries from the wave; keys and values from the wave and from the text's states

Length is padded to a multiple of all strides and cropped again. Kernels of transposed convolutions are twice their stride, so that no
checkerboard appears. The last layer begins at zero: the first prediction is 0. Without a text the model has a learnt one of its own, that
of guidance. With `words` above 0 it has embeddings of that many words in place of a text encoder.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from modelwright.core.model.anatomy import add_role

add_role(r"^net\.(stem|down|up|out|time|prompt)\b.*", "wave")
add_role(r"\.self_attn\.[kv]_text", "attn.text")
add_role(r"^net\.null\w*", "wave.null")


class WaveUNetConfig(PreTrainedConfig):
    """widths: channels of the levels; stem: stride of the first; text_width: of the states of the text encoder."""

    model_type = "wave_unet"
    widths: list[int] | tuple[int, ...] = (64, 96, 128)
    stem: int = 8
    stride: int = 4
    layers: int = 2
    heads: int = 4
    text_width: int = 64
    words: int = 0
    prediction: str = "v"
    rate: int = 8000
    length: int = 4096

    @property
    def multiple(self) -> int:
        """Samples that a length must be a multiple of."""
        return self.stem * self.stride ** (len(self.widths) - 1)


class Residual(nn.Module):
    """Two convolutions, scaled and shifted by e (B, E) in between."""

    def __init__(self, given: int, width: int, e: int):
        super().__init__()
        self.first, self.second = nn.Conv1d(given, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(math.gcd(8, given), given), nn.GroupNorm(math.gcd(8, width), width)
        self.told = nn.Linear(e, 2 * width)
        self.skip = nn.Conv1d(given, width, 1) if given != width else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.told(e)[..., None].chunk(2, 1)
        y = self.norm2(self.first(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.skip(x) + self.second(F.silu(y))


class TextAttention(nn.Module):
    """Queries from x (B, T, d); keys and values from x and from the text's states (B, n, D), of which `mask` (B, n) are real."""

    def __init__(self, width: int, heads: int, text: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.k_text, self.v_text = nn.Linear(text, width), nn.Linear(text, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(b, -1, self.heads, d // self.heads).transpose(1, 2)

        k = torch.cat([self.k_proj(x), self.k_text(text)], 1)
        v = torch.cat([self.v_proj(x), self.v_text(text)], 1)
        seen = torch.cat([torch.ones(b, t, dtype=torch.bool, device=x.device), mask], 1)[:, None, None]
        y = F.scaled_dot_product_attention(split(self.q_proj(x)), split(k), split(v), attn_mask=seen)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    """A transformer block of the deepest level."""

    def __init__(self, c: Any, width: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = TextAttention(width, c.heads, c.text_width), Mlp(width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), text, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def halved(given: int, width: int, s: int) -> nn.Module:
    """A convolution that makes a length s times shorter."""
    return nn.Conv1d(given, width, 2 * s, s, padding=s // 2) if s > 1 else nn.Conv1d(given, width, 3, padding=1)


def doubled(given: int, width: int, s: int) -> nn.Module:
    """A convolution that makes a length s times longer."""
    return nn.ConvTranspose1d(given, width, 2 * s, s, padding=s // 2) if s > 1 else nn.Conv1d(given, width, 3, padding=1)


class Net(nn.Module):
    """The U-Net itself."""

    def __init__(self, c: Any):
        super().__init__()
        widths, e = list(c.widths), 2 * c.widths[0]
        deep, k = widths[-1], c.stem
        self.stem = halved(1, widths[0], k)
        self.time = nn.Sequential(nn.Linear(64, e), nn.SiLU(), nn.Linear(e, e))
        self.prompt = nn.ModuleDict({"summary": nn.Linear(c.text_width, e)})
        if c.words:
            self.prompt["words"] = nn.Embedding(c.words, c.text_width)
        self.null = nn.Parameter(torch.zeros(1, c.text_width))
        s = c.stride
        pairs = list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(nn.ModuleDict({"block": Residual(a, a, e), "step": halved(a, b, s)}) for a, b in pairs)
        self.middle = nn.ModuleDict({"layers": nn.ModuleList(Block(c, deep) for _ in range(c.layers))})
        self.up = nn.ModuleList(nn.ModuleDict({"step": doubled(b, a, s), "block": Residual(2 * a, a, e)}) for a, b in reversed(pairs))
        self.out = doubled(widths[0], 1, k)

    def forward(self, wave: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        frequencies = torch.exp(torch.linspace(0, math.log(1000), 32, device=time.device))
        angles = time[:, None] * frequencies * math.pi / 2
        weight = mask[..., None].to(text.dtype)
        summary = (text * weight).sum(1) / weight.sum(1).clamp(min=1)
        e = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1).to(text.dtype)) + self.prompt["summary"](summary))
        x, skips = self.stem(wave[:, None]), []
        for level in self.down:
            x = level["block"](x, e)  # type: ignore[index]
            skips.append(x)
            x = level["step"](x)  # type: ignore[index]
        x = x.transpose(1, 2)
        x = x + _places(x)
        for block in self.middle["layers"]:  # type: ignore[attr-defined]
            x = block(x, text, mask)
        x = x.transpose(1, 2)
        for level in self.up:
            x = level["block"](torch.cat([level["step"](x), skips.pop()], 1), e)  # type: ignore[index]
        return self.out(F.silu(x))[:, 0]


def _places(x: Tensor) -> Tensor:
    """Sinusoids of the place, (T, d): any length."""
    t, d = x.shape[1:]
    f = torch.exp(-math.log(10_000) * torch.arange(0, d, 2, device=x.device) / d)
    angle = torch.arange(t, device=x.device)[:, None] * f
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :d].to(x.dtype)


class WaveUNet(PreTrainedModel):
    """Predicts v (or noise, or the wave) from a noisy wave, its time and a text."""

    config_class = WaveUNetConfig
    base_model_prefix = "net"
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.net = Net(config)
        self.post_init()
        nn.init.zeros_(self.net.out.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net.out.bias)  # type: ignore[arg-type]

    def _init_weights(self, module: nn.Module) -> None:
        """Layers keep the initialisation of torch."""

    def forward(
        self, wave: Tensor, time: Tensor, text: Tensor | None = None, mask: Tensor | None = None, words: Tensor | None = None
    ) -> Tensor:
        """wave (B, L), time (B,) in [0, 1]; text (B, n, D) states or words (B, n) ids, mask (B, n) real ones. Rows without a real one,
        and all rows where neither is given, have the learnt text of the unconditional model. Returns (B, L)."""
        length, multiple = wave.shape[1], self.config.multiple
        wave = F.pad(wave, (0, -length % multiple))
        if words is not None:
            text = self.net.prompt["words"](words)
        null = self.net.null.expand(len(wave), 1, -1)
        if text is None:
            text, mask = null, torch.ones(len(wave), 1, dtype=torch.bool, device=wave.device)
        else:
            assert mask is not None
            text, mask = torch.cat([null, text], 1), torch.cat([~mask.any(1, keepdim=True), mask], 1)
        return self.net(wave, time, text, mask)[:, :length]


AutoConfig.register("wave_unet", WaveUNetConfig)
AutoModel.register(WaveUNetConfig, WaveUNet)
