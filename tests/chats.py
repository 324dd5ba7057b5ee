"""Chat templates of ten families of models, and small tokenizers that carry them."""

from functools import cache
from typing import Any

# ---- templates: structure as published, words anew; (( and )) stand where {% generation %} may ------------------------------------------
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
TURN = "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}((%s)){% else %}%s{% endif %}{{ '\n' }}"
CHATML = (
    "{% for m in messages %}"
    + TURN.replace("%s", "{{ m['content'] + '<|im_end|>' }}")
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}(({{ m['content'] | trim + '<|eot_id|>' }}))"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # the system's words go into the first user turn; an answer begins with a space that is not part of the prompt
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}" + ALTERNATE + ""
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}(({{ ' ' + m['content'] | trim + eos_token }})){% endif %}{% endfor %}"
)
QWEN3 = (  # thoughts are shown after the last question alone, where an answer without any gets empty ones
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}{% set content = m['content'] %}{% set thought = '' %}{% if m['reasoning_content'] is string %}"
    "{% set thought = m['reasoning_content'] %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "(({{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') + '<|im_end|>' }}))"
    "{% else %}(({{ content + '<|im_end|>' }})){% endif %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if m['role'] == 'assistant' %}(({{ m['content'] | trim + '<end_of_turn>' }}))"
    "{% else %}{{ m['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (  # without a prompt for an answer the whole text ends with the end of all texts
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}(({{ m['content'] + '<|end|>' }})){{ '\n' }}"
    "{% elif m['role'] in ('system', 'user') %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (  # the words that name a role are no special tokens
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' %}(({{ m['content'] + eos_token }})){% else %}{{ m['content'] + eos_token }}{% endif %}{{ '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (  # every answer loses its thoughts; the prompt opens new ones
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' }}(({{ content + '<｜end▁of▁sentence｜>' }})){% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
GLM = (  # a turn has no end of its own: the name of the next role ends it; the line end after a role is not part of the prompt
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}(({{ '\n' + m['content'] })){% else %}{{ '\n' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
).replace("m['content'] }))", "m['content'] }}))")
OLMO = (  # begin and end are one token; the line end is left out after the last turn
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'assistant' %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' }}(({{ m['content'] + eos_token }})){% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
NEXT = OLMO.replace("(({{ m['content'] + eos_token }}))", "(({{ m['content'] }})){% if not loop.last %}{{ eos_token }}{% endif %}")

# name -> template, the tokens that it adds, begin, end of all texts, end of a turn
FAMILIES: dict[str, tuple[str, list[str], str, str, str]] = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<s>", "<|endoftext|>", "<|im_end|>"),
    "llama 3": (
        LLAMA3,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"], "<s>", "</s>", "</s>"),
    "qwen 3": (QWEN3, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], "<s>", "<|endoftext|>", "<|im_end|>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", "<end_of_turn>"),
    "phi": (PHI, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<s>", "<|endoftext|>", "<|end|>"),
    "zephyr": (ZEPHYR, [], "<s>", "</s>", "</s>"),
    "deepseek": (
        DEEPSEEK,
        ["<｜User｜>", "<｜Assistant｜>"],
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "glm": (GLM, ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"], "<s>", "<|endoftext|>", ""),
    "olmo": (OLMO, [], "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
}
KINDS = ["byte level", "metaspace first", "metaspace always", "metaspace never"]
WORDS = "sum of two and three is five yes no please größer als assistant user the model says so answer: question? one two, three."
PLAIN = ["<think>", "</think>"]  # added tokens that are not special, as in Qwen 3


def unmarked(template: str) -> str:
    return template.replace("((", "").replace("))", "")


def marked(template: str) -> str:
    return template.replace("((", "{% generation %}").replace("))", "{% endgeneration %}")


@cache
def tokenizer_of(kind: str, family: str) -> Any:
    """A small tokenizer with the tokens and the template of a family."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template, extra, bos, eos, _ = FAMILIES[family]
    if kind == "byte level":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.split()[1])
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
        alphabet = ["▁", "\n", *(chr(c) for c in range(33, 127))]
    specials = list(dict.fromkeys(["<unk>", bos, eos, *(f"<0x{b:02X}>" for b in range(256) if kind != "byte level")]))
    inner.train_from_iterator(
        [WORDS] * 4, trainers.BpeTrainer(vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    if kind != "byte level":  # bytes are pieces, not words to be found in a text
        import json

        state = json.loads(inner.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
        inner = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in extra if t not in PLAIN]})
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in extra if t in PLAIN])
    tokenizer.chat_template = unmarked(template)
    return tokenizer


def say(*turns: str) -> list[dict[str, str]]:
    """Messages of alternating roles; the first is the system's where it begins with a star."""
    system = [{"role": "system", "content": turns[0][1:]}] if turns[0].startswith("*") else []
    rest = turns[1:] if system else turns
    return system + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(rest)]
