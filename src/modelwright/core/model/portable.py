"""Saved settings that older engines read as well, and what the hub reads in a model card.

transformers 5 keeps some settings under new names. A reader that knows only the old names finds nothing there, says nothing and
uses its own default. Found by comparing every text model of transformers 5.23 with 4.57:

- rope_parameters. The old names are rope_theta, rope_scaling and partial_rotary_factor. Mixtral's default theta is 1e6, so a
  Llama that became a Mixtral had logits that differ by up to 4.3. GPT-NeoX and Gemma 3 have old names of their own.
- num_experts of Qwen3-MoE, which is now num_local_experts. 4.57 made 128 experts.
- tokenizer_class TokenizersBackend, which 4.57 does not know, and a list of extra_special_tokens, which it cannot read.

- the end of a chat. A template may end a turn with a token that is not eos_token; engines stop where generation_config.json
  says, so the text ran on to the limit.

Both spellings are written and mean the same. What transformers 5 reads back is unchanged; tests hold both.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from modelwright.core.errors import UserError

_NOT_SCALING = ("rope_theta", "partial_rotary_factor", "type")


def make_portable(folder: Path) -> None:
    """Rewrite config.json and tokenizer_config.json of a saved checkpoint with both spellings."""
    for name, both in (("config.json", portable_config), ("tokenizer_config.json", portable_tokenizer)):
        if (folder / name).is_file():
            old = _read(folder / name)
            if (new := both(old)) != old:
                _write(folder / name, new)
    if (folder / "tokenizer_config.json").is_file() and (folder / "config.json").is_file():
        from transformers import AutoTokenizer

        file = folder / "generation_config.json"
        config, old = _read(folder / "config.json"), _read(file) if file.is_file() else {}
        ends = chat_ends(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        known = _list(old.get("eos_token_id", config.get("eos_token_id")))
        if new_ends := [i for i in ends if i not in known]:
            _write(file, old | {"eos_token_id": known + new_ends})


def chat_ends(tokenizer: Any) -> list[int]:
    """The token that ends an assistant's turn in the tokenizer's chat template: the first special one after what was said."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
    except Exception:  # a template may refuse what it does not like, in any way it likes
        return []
    special = [i for i in whole[len(prompt) :] if i in tokenizer.all_special_ids]
    return special[:1] if whole[: len(prompt)] == prompt else []


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with the old spellings beside the new ones; old spellings that are there are set anew."""
    kind = config.get("model_type")
    found = config | _rope(kind, config.get("rope_parameters") or {})
    if kind == "qwen3_moe" and "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    return found


def _rope(kind: str | None, rope: dict[str, Any]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if kind == "gemma3_text" and rope.get("full_attention") and rope.get("sliding_attention"):
        more["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" not in rope:  # no rotary positions, or one table per kind of layer, which has no old spelling
        return {}
    theta, part = rope["rope_theta"], rope.get("partial_rotary_factor")
    if kind in ("gpt_neox", "gpt_neox_japanese"):
        more |= {"rotary_emb_base": theta} | ({} if part is None else {"rotary_pct": part})
    else:
        more |= {"rope_theta": theta} | ({} if part is None else {"partial_rotary_factor": part})
    if rope.get("rope_type") == "longrope" and "original_max_position_embeddings" in rope:
        more["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return more | {"rope_scaling": _scaling(kind, rope)}


def _scaling(kind: str | None, rope: dict[str, Any]) -> dict[str, Any] | None:
    if rope.get("rope_type", "default") == "default":
        return None
    if kind == "phi3":  # it takes these three settings and no others; the original length stands at the top of the config
        return {"type": rope["rope_type"], "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {k: v for k, v in rope.items() if k not in _NOT_SCALING}


def portable_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer_config.json with names that transformers 4 and 5 both read."""
    found = dict(config)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):  # how it was read, which is no setting of it
        found.pop(name, None)
    return found


# ---- the model card --------------------------------------------------------------------------------------------------
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
_LICENCE = ("license", "license_name", "license_link")


def card_metadata(base: str | None, base_folder: Path | None, steps: list[dict[str, Any]], loads_in: str) -> dict[str, Any]:
    """What the hub reads at the head of README.md: base_model, datasets, license and language of the base, tags, library_name.

    Only hub ids are named: a path of this machine means nothing there. A base that is a folder hands on the base_model and the
    datasets of its own card. `steps` are entries with `step` and `knobs`; `loads_in` is the class.
    """
    card = _front_matter(base_folder / "README.md") if base_folder else {}
    others = [o for s in steps for o in s["knobs"].get("others") or []]
    bases = [b for b in (base, *others) if _on_hub(b)] or _list(card.get("base_model"))
    datasets = _list(card.get("datasets")) + [d for s in steps for d in _paths(s["knobs"].get("data")) if _on_hub(d)]
    import transformers

    ours = not hasattr(transformers, loads_in)
    found: dict[str, Any] = {
        "library_name": "modelwright" if ours else "transformers",  # what must be imported before the class loads
        "tags": ["modelwright", *dict.fromkeys(s["step"] for s in steps)] + (["merge"] if others else []),
    }
    if loads_in.endswith(("ForCausalLM", "LMHeadModel")):
        found["pipeline_tag"] = "text-generation"
    if bases:
        found["base_model"] = bases[0] if len(bases) == 1 else bases
        found["base_model_relation"] = "merge" if others else "finetune"
    if datasets:
        found["datasets"] = list(dict.fromkeys(datasets))
    return found | {k: card[k] for k in (*_LICENCE, "language") if k in card}


def _front_matter(file: Path) -> dict[str, Any]:
    """The metadata block of a card; none where there is no card or no block."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    block = re.match(r"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
    try:
        found = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        raise UserError(f"the metadata of {file} is not valid YAML", str(error).splitlines()[0], "mend or remove the block") from None
    return found if isinstance(found, dict) else {}


def _list(value: Any) -> list[Any]:
    return [v for v in (value if isinstance(value, list) else [value]) if v is not None]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "path" and isinstance(inner, str):
                yield inner
            else:
                yield from _paths(inner)


def _on_hub(name: Any) -> bool:
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and not name.endswith(_FILE) and not Path(name).exists()
