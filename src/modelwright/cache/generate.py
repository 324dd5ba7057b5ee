"""Continue a prompt with most of its keys and values evicted once it is read; the model is not changed.

--evict names the way: nacl (2408.03675), snapkv (2404.14469), h2o (2306.14048), streaming_llm (2309.17453), tova (2401.06104),
pyramidkv (2406.02069), key_norm (2406.11430), random. What is the papers' and what is ours stands in cache/evictors/nacl.py and
cache/evictors/baselines.py; settings of a method are given as --settings '{sinks: 8}'. --keep is the share of the prompt that stays, in
every layer and head; --tokens a number instead. All of the prompt is attended to while it is read, so the first token of the
answer is the model's own; the cache grows by each token written. --question is read after the eviction: one that the
proxies of nacl or the window of snapkv cannot see. --compare writes the answer of the full cache beside it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import modelwright.models  # noqa: F401 - our classes become known, and experts of any width run
from modelwright.cache.engine.evict import evict
from modelwright.cache.engine.measure import fits_context, nbytes
from modelwright.cache.evictors.names import named
from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.model.checkpoint import check_vocabulary
from modelwright.core.step import EvalResult, StepContext


@dataclass(frozen=True)
class Knobs:
    prompt_file: str | None = knob(None, "text file that holds the prompt", path=True)
    prompt: str | None = knob(None, "the prompt itself")
    question: str | None = knob(None, "text that is read after the prompt was evicted")
    evict: Literal["nacl", "snapkv", "h2o", "streaming_llm", "tova", "pyramidkv", "key_norm", "random"] = knob("nacl", "how to choose")
    keep: float = knob(0.5, "share of the prompt's tokens that stay", low=0, high=1)
    tokens: int | None = knob(None, "tokens of the prompt that stay; overrides keep", low=1)
    settings: dict[str, Any] = knob({}, "the method's own settings, as in {sinks: 8}")
    max_new_tokens: int = knob(64, "tokens to write, at most", low=1)
    temperature: float = knob(0.0, "0: greedy; above: sampling", low=0)
    beams: int = knob(1, "beams to search with", low=1)
    chunk: int | None = knob(None, "read the prompt in pieces of so many tokens", low=2)
    compare: bool = knob(False, "also answer with the full cache")


def generate(knobs: Knobs, job: StepContext) -> EvalResult:
    """Answer one prompt. Raises UserError for a prompt, a model or a budget that does not fit."""
    from transformers import GenerationConfig

    method = named(knobs.evict, knobs.keep, knobs.tokens, knobs.settings, job.seed)
    model, tokenizer, ids, question = _ready(knobs, job)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    how: dict[str, Any] = {"do_sample": knobs.temperature > 0, "num_beams": knobs.beams}
    if knobs.temperature:
        how |= {"temperature": knobs.temperature, "top_k": 0, "top_p": 1.0}
    chunk = knobs.chunk
    while chunk and chunk < ids.shape[1] and ids.shape[1] % chunk == 1:  # one token alone would end the prompt before it
        chunk += 1
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    settings = GenerationConfig(
        max_new_tokens=knobs.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        prefill_chunk_size=chunk,
        return_dict_in_generate=True,
        **how,
    )

    def answer(block: Any) -> tuple[list[int], int]:
        torch.manual_seed(job.seed)
        whole, past = torch.cat([ids, question], 1), {}
        if question.shape[1]:
            cache = None
            for piece in ids.split(chunk or ids.shape[1], 1):
                cache = model(piece, past_key_values=cache, use_cache=True, **_last(model)).past_key_values
            if block and chunk:
                block.finish(cache)
            past = {"past_key_values": cache}
            settings.prefill_chunk_size = None
        out = model.generate(whole, attention_mask=torch.ones_like(whole), generation_config=settings, **past)
        return out.sequences[0, whole.shape[1] :].tolist(), nbytes(out.past_key_values) // knobs.beams

    with torch.inference_mode():
        with job.progress.task("cache.generate"), evict(model, method, chunked=bool(chunk)) as block:
            written, held = answer(block)
        full = answer(None) if knobs.compare else None
    return _finding(knobs, tokenizer, ids.shape[1], question.shape[1], written, held, full)


def _last(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


def _ready(knobs: Knobs, job: StepContext) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    if (knobs.prompt is None) == (knobs.prompt_file is None):
        raise UserError("one prompt is needed", how="give --prompt-file FILE or --prompt TEXT")
    if knobs.question is not None and knobs.beams > 1:
        raise UserError("beams do not fit a question", "the evicted prompt is read once", "leave --beams out")
    text = knobs.prompt
    if text is None:
        try:
            text = Path(knobs.prompt_file or "").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{knobs.prompt_file} cannot be read", type(error).__name__, "give a text file") from None
    tokenizer = job.source.tokenizer()
    if tokenizer is None:
        raise UserError(f"{job.source.folder} has no tokenizer", "the prompt is text", "add its tokenizer files")
    model = job.source.model().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    check_vocabulary(tokenizer, int(model.config.get_text_config().vocab_size), job.source.folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    question = tokenizer(knobs.question or "", return_tensors="pt", add_special_tokens=False)["input_ids"].long()
    question = question.reshape(1, -1)
    if not ids.numel():
        raise UserError("the prompt is empty", how="give some text")
    fits_context(model, ids.shape[1] + question.shape[1] + knobs.max_new_tokens, "prompt and answer", "shorten the prompt")
    return model, tokenizer, ids.to(model.device), question.to(model.device)


def _finding(
    knobs: Knobs, tokenizer: Any, prompt: int, question: int, written: list[int], held: int, full: tuple[list[int], int] | None
) -> EvalResult:
    text = tokenizer.decode(written, skip_special_tokens=True)
    metrics: dict[str, Any] = {
        "text": text,
        "evict": knobs.evict,
        "prompt_tokens": prompt,
        "question_tokens": question,
        "new_tokens": len(written),
        "cache_bytes": held,
    }
    answers = [[knobs.evict, text.strip()]]
    tiles = [(f"{held:,}", "bytes of cache at the end", f"{prompt:,} tokens of prompt, {len(written)} written")]
    if full:
        same = next((i for i, (a, b) in enumerate(zip(written, full[0], strict=False)) if a != b), min(len(written), len(full[0])))
        whole = tokenizer.decode(full[0], skip_special_tokens=True)
        metrics |= {"full_text": whole, "full_cache_bytes": full[1], "same_tokens": same}
        answers.append(["full cache", whole.strip()])
        tiles += [
            (f"{held / full[1]:.0%}", "of the full cache's bytes", f"{full[1]:,} bytes"),
            (f"{same} of {len(full[0])}", "tokens alike from the start", ""),
        ]
    table = {"title": "Answers", "columns": ["cache", "text"], "rows": answers, "prose": True}
    return EvalResult(metrics, f"{knobs.evict} kept {_budget(knobs)}.", tiles, [table])


def _budget(knobs: Knobs) -> str:
    return f"{knobs.tokens} tokens" if knobs.tokens else f"{knobs.keep:.0%} of the prompt"


METHOD = generate
