"""A Llama that reads patches of rendered text beside tokens, as a transformers model: "pixel_llama" (PixelGPT, arXiv 2404.10710).

    import modelwright.models                          # registers the class

    sequence = [patches ; tokens], one causal Llama over both
    patch    Conv(3 -> d, kernel = stride = p, with bias), then LayerNorm; no further positions than Llama's own
    heads    lm_pixel_head (d -> 3 p p, no bias), lm_head (d -> V, no bias), and with num_classes a score (d -> classes, no bias)

Text alone is Llama's own forward, bit for bit, and every weight of it has Llama's name, so checkpoints are loaded both ways. A white tail
behind the patches is masked and takes no position, so its pixels never matter.

The official code copies Llama's modelling file; its joint forward stops on a missing mask. It pools a classified text one token before the
first pad, found by the id of the pad token, which may stand inside a text; here the mask says where a text ends.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import initialization as init
from transformers.utils import ModelOutput

from modelwright.core.model.anatomy import add_role

add_role(r"patch_embed\.projection", "embed.patch")
add_role(r"patch_embed\.norm", "norm.patch")
add_role(r"lm_pixel_head", "head.pixel")
add_role(r"^score", "head.score")


class PixelLlamaConfig(LlamaConfig):
    """LlamaConfig with the patches; `pixel_targets` says what the pixel head learnt, `font` and `font_hash` what was rendered with."""

    model_type = "pixel_llama"
    patch_size: int = 16
    pixel_targets: str = "mended"
    num_classes: int = 0
    font: str = ""
    font_size: int = 13
    font_hash: str = ""


@dataclass
class PixelOutput(ModelOutput):
    """pixels (B, P, 3pp): the patch that follows each patch; logits (B, T, V) of the tokens; classes (B, C); real (B, P + T)."""

    pixels: Tensor | None = None
    logits: Tensor | None = None
    classes: Tensor | None = None
    real: Tensor | None = None


class PatchEmbed(nn.Module):
    """Patches (B, P, p*p*3), pixels row by row with their colours, as states (B, P, d)."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.size = size
        self.projection = nn.Conv2d(3, width, size, size)
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Tensor) -> Tensor:
        b, n, _ = patches.shape
        image = patches.view(b * n, self.size, self.size, 3).permute(0, 3, 1, 2).to(self.projection.weight.dtype)
        return self.norm(self.projection(image).view(b, n, -1))


class PixelLlamaForCausalLM(LlamaForCausalLM):
    """Llama with eyes."""

    config_class = PixelLlamaConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.patch_embed = PatchEmbed(config.patch_size, config.hidden_size)
        self.lm_pixel_head = nn.Linear(config.hidden_size, 3 * config.patch_size**2, bias=False)
        if config.num_classes:
            self.score = nn.Linear(config.hidden_size, config.num_classes, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchEmbed):
            bound = (6 / (module.projection.weight[0].numel() + module.projection.weight.shape[0])) ** 0.5  # xavier of the flat weight
            init.uniform_(module.projection.weight, -bound, bound)
            init.zeros_(module.projection.bias)  # type: ignore[arg-type]

    def forward(  # generation looks for the names of Llama's own arguments
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        *,
        patches: Tensor | None = None,
        patch_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Without patches Llama's own forward, unless `joint` asks for the form of the output that patches have.

        patches (B, P, 3pp) in [0, 1]; patch_mask (B, P): real ones, the last black one included; input_ids (B, T) may be empty.
        """
        if not kwargs.pop("joint", patches is not None):
            own = {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **own, **kwargs)
        hidden, real, seen = self._states(input_ids, attention_mask, patches, patch_mask)
        classes = None
        if self.config.num_classes:
            last = (torch.arange(real.shape[1], device=real.device) * real).argmax(1)
            classes = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        return PixelOutput(self.lm_pixel_head(hidden[:, :seen]), self.lm_head(hidden[:, seen:]), classes, real)

    def _states(
        self, ids: Tensor | None, attention_mask: Tensor | None, patches: Tensor | None, patch_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        """States of both streams, which places are real, and how many of them are patches."""
        parts, masks = [], []
        if patches is not None:
            parts.append(self.patch_embed(patches))
            masks.append(torch.ones(patches.shape[:2], device=patches.device).long() if patch_mask is None else patch_mask.long())
        if ids is not None and ids.shape[1]:
            parts.append(self.model.embed_tokens(ids))
            masks.append(torch.ones_like(ids) if attention_mask is None else attention_mask.long())
        real = torch.cat(masks, 1)
        places = (real.cumsum(1) - 1).clamp(min=0)
        out = self.model(inputs_embeds=torch.cat(parts, 1), attention_mask=real, position_ids=places, use_cache=False)
        return out.last_hidden_state, real.bool(), 0 if patches is None else patches.shape[1]

    @classmethod
    def from_llama(cls, model: Any, **settings: Any) -> "PixelLlamaForCausalLM":
        """The weights of a Llama (or of one of this kind) and fresh ones for what it lacks."""
        values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")}
        new = cls(PixelLlamaConfig(**(values | settings)))
        held = {k: v for k, v in model.state_dict().items() if k in new.state_dict() and v.shape == new.state_dict()[k].shape}
        new.load_state_dict(held, strict=False)
        new.tie_weights()
        new.generation_config = copy.deepcopy(model.generation_config)
        return new.to(next(model.parameters()).dtype)


def patchify(image: Tensor, size: int) -> Tensor:
    """An image (H, W, 3) as patches (H W / p^2, p*p*3), row by row of patches, each row by row of pixels."""
    h, w, c = image.shape
    return image.view(h // size, size, w // size, size, c).transpose(1, 2).reshape(-1, size * size * c)


def unpatchify(patches: Tensor, size: int, width: int) -> Tensor:
    """The image (H, width, 3) of patches, for any height and width."""
    across = width // size
    return patches.view(-1, across, size, size, 3).transpose(1, 2).reshape(-1, width, 3)


def targets(patches: Tensor, how: str) -> Tensor:
    """What the pixel head learns, patches (..., 3pp) in [0, 1]. plain: the pixels. normalised (the paper's): each patch by its mean and
    its unbiased standard deviation, which makes black and white patches alike, all 0. mended: the same, but a patch of one colour is
    2 * colour - 1 everywhere: white 1, black -1, so that the black patch at the end can be predicted."""
    if how == "plain":
        return patches
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    flat = (patches - mean) / (var + 1e-6).sqrt()
    return torch.where(var < 1e-8, 2 * mean - 1 + 0 * patches, flat) if how == "mended" else flat


AutoConfig.register("pixel_llama", PixelLlamaConfig)
AutoModelForCausalLM.register(PixelLlamaConfig, PixelLlamaForCausalLM)
