"""The sizes of the wider model, checked: what each axis may become, and what the config says then."""

from dataclasses import dataclass
from typing import Any

from modelwright.core.errors import UserError
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.reshape.growth.width import Axis, Width

KINDS = ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "gpt2")  # each tested to keep its logits
_EPSILON = ("rms_norm_eps", "layer_norm_epsilon")


@dataclass(frozen=True)
class Sizes:
    """A model's widths. `group` is the query heads per key and value head."""

    hidden: int
    kv: int
    group: int
    head_dim: int
    ffn: int

    @property
    def heads(self) -> int:
        return self.kv * self.group


def sizes_of(config: Any) -> Sizes:
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    ffn = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return Sizes(config.hidden_size, kv, heads // kv, head_dim, ffn)


def wider(source: Checkpoint, anatomy: Anatomy, operator: str, knobs: Any, seed: int) -> tuple[Width, dict[str, Any]] | None:
    """The wider model's axes and what its config says otherwise; None where nothing gets wider."""
    config, name = source.hf_config, type(source.skeleton).__name__
    if knobs.hidden is None and knobs.heads is None and knobs.ffn is None:
        return None
    if source.config["model_type"] not in KINDS:
        raise UserError(
            f"{name} cannot be made wider",
            f"model type '{source.config['model_type']}' is not among those shown to keep their function ({', '.join(KINDS)})",
            "grow its depth alone",
        )
    old = sizes_of(config)
    new = _target(old, knobs.hidden or old.hidden, knobs.heads, knobs.ffn, operator)
    if new == old:
        return None
    explicit = hasattr(config, "num_key_value_heads")  # such a class takes head_dim from its config
    if not explicit and new.heads * new.head_dim != new.hidden:
        raise UserError(
            f"heads={new.heads} do not fill hidden={new.hidden}",
            f"{name} has heads of width hidden / heads, and they are {old.head_dim} wide",
            f"give hidden={new.heads * new.head_dim}, or leave heads out",
        )
    scheme = {"zero": "pad", "masked": "pad", "interpolate": "repeat"}.get(operator, "tile")
    width = Width(
        axes={
            "hidden": Axis(old.hidden, new.hidden, 1, scheme),
            "q": Axis(old.kv, new.kv, old.group * old.head_dim, scheme),  # a group moves whole, with its key and value head
            "kv": Axis(old.kv, new.kv, old.head_dim, scheme),
            "ffn": Axis(old.ffn, new.ffn, 1, scheme),
        },
        noise=knobs.noise,
        std=float(getattr(config, "initializer_range", 0.02)),
        tied=any(p.role == "embed" and any(t.startswith("lm_head") for t in p.tied) for p in anatomy),
        layer_norm=any(p.role == "norm.final" and p.kind == "bias" for p in anatomy),
        seed=seed,
        random=operator == "masked",
    )
    if width.random and width.layer_norm and new.hidden > old.hidden:
        raise UserError(
            f"{name} cannot have masked units in its residual stream",
            "LayerNorm subtracts a mean that masked units would change",
            "grow heads, ffn or depth by masks, or use another operator",
        )
    return width, _settings(source, old, new, width, explicit)


def _target(old: Sizes, hidden: int, heads: int | None, ffn: int | None, operator: str) -> Sizes:
    if hidden < old.hidden:
        raise UserError(f"hidden={hidden} is smaller than the model's {old.hidden}", "growing makes nothing smaller", "give a larger one")
    if operator not in ("zero", "masked") and hidden % old.hidden:
        low = hidden // old.hidden * old.hidden
        raise UserError(
            f"hidden={hidden} cannot be reached by copying {old.hidden} units",
            "the norms take a mean over all units, which stays the same only if each has as many copies",
            f"the nearest widths are {low} and {low + old.hidden}; or use operator=zero",
        )
    if heads is None:
        if old.heads * hidden % old.hidden or old.heads * hidden // old.hidden % old.group:
            step = old.hidden // old.kv if old.hidden % old.kv == 0 else old.hidden
            low = hidden // step * step
            raise UserError(
                f"hidden={hidden} is no whole number of heads",
                f"{old.heads} heads on {old.hidden} units grow by groups of {old.group}",
                f"the nearest widths are {low} and {low + step}; or give heads",
            )
        heads = old.heads * hidden // old.hidden
    if heads < old.heads or heads % old.group:
        raise UserError(
            f"heads={heads} does not fit",
            f"the model has {old.heads} query heads, {old.group} for each key and value head",
            f"give {old.heads} or more, in multiples of {old.group}",
        )
    ffn = round(old.ffn * hidden / old.hidden) if ffn is None else ffn
    if ffn < old.ffn:
        raise UserError(f"ffn={ffn} is smaller than the model's {old.ffn}", "growing makes nothing smaller", "give a larger one")
    return Sizes(hidden, heads // old.group, old.group, old.head_dim, ffn)


def _settings(source: Checkpoint, old: Sizes, new: Sizes, width: Width, explicit: bool) -> dict[str, Any]:
    raw, names = source.config, type(source.hf_config).attribute_map
    changed: dict[str, Any] = {
        names.get("hidden_size", "hidden_size"): new.hidden,
        names.get("num_attention_heads", "num_attention_heads"): new.heads,
    }
    if explicit:
        changed |= {"num_key_value_heads": new.kv, "intermediate_size": new.ffn}
        if raw.get("head_dim") or new.heads * new.head_dim != new.hidden:
            changed["head_dim"] = new.head_dim
    elif raw.get("n_inner") or new.ffn != 4 * new.hidden:
        changed["n_inner"] = new.ffn
    if width.random:  # what tune.masked hides
        changed["grown_from"] = {"hidden": old.hidden, "heads": old.heads, "ffn": old.ffn}
    elif width.pads and width.ratio != 1:
        changed |= {k: getattr(source.hf_config, k) / width.ratio for k in _EPSILON if hasattr(source.hf_config, k)}
    return changed
