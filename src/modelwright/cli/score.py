"""`modelwright eval`: how well a checkpoint predicts texts, and chooses among answers.

Texts and chats: bits per byte (tokens per byte times bits per token, as while tuning) and next-token accuracy, the share
of learnt tokens that the model finds likeliest. Tasks with choices, a row per item: `prompt`, `choices` and `answer` (a
number from 0, or the choice itself). Accuracy by the summed log-likelihood of each choice after the prompt, and by that sum per
byte; both are lm-eval's acc and acc_norm. --tasks runs lm-eval itself.
"""

import math
from typing import Any

import torch

import modelwright.models  # noqa: F401 - our classes become known to the Auto classes
from modelwright.cli.output import print_json, resumable
from modelwright.core.data.make import tokenize
from modelwright.core.data.read import is_text, read, read_table
from modelwright.core.data.rows import IGNORE, collate
from modelwright.core.errors import UserError, short
from modelwright.core.knobs import Data
from modelwright.core.model.checkpoint import Checkpoint, check_vocabulary, silence_transformers
from modelwright.core.numbers.stats import wilson
from modelwright.core.report.page import Report, Section

_TASK = ("prompt", "choices", "answer")


def evaluate(
    base: str,
    files: list[str],
    column: str | None,
    limit: int | None,
    context: int,
    batch: int,
    tasks: str | None,
    shots: int | None,
    as_json: bool,
) -> dict[str, Any]:
    """Measure a checkpoint on every file and on the tasks of lm-eval; print a table, or json."""
    if not files and not tasks:
        raise UserError("there is nothing to measure on", how="give a text or task file, or --tasks with tasks of lm-eval")
    if shots is not None and not tasks:
        raise UserError("--shots has no use", "it belongs to --tasks", "leave it out")
    silence_transformers()
    with resumable(False):
        source = Checkpoint(base)
        tokenizer = source.tokenizer()
        check_vocabulary(tokenizer, int(source.hf_config.get_text_config().vocab_size), source.folder)
        sources = [Data(path=f, column=column, limit=limit) for f in files]
        read_before = [(d, _items(d)) for d in sources]  # a wrong file is refused before a model is loaded
        if any(items for _, items in read_before) and tokenizer is None:
            raise UserError(f"{source.folder} has no tokenizer", "the items are text", "add its tokenizer files")
        model = source.model().eval().to("cuda" if torch.cuda.is_available() else "cpu")
        found: dict[str, dict[str, Any]] = {}
        for data, items in read_before:
            found[str(data.path)] = choose(model, tokenizer, items) if items else predict(model, tokenizer, data, context, batch)
        if tasks:
            found |= harness(model, tokenizer, tasks, shots, limit, batch)
    if as_json:
        print_json({"base": base, "results": found})
    else:
        _print(base, found)
    return found


def _print(base: str, found: dict[str, dict[str, Any]]) -> None:
    names = list(dict.fromkeys(k for row in found.values() for k in row if not isinstance(row[k], list)))
    rows = [[name, *(_shown(row.get(k)) for k in names)] for name, row in found.items()]
    Report(
        base, [Section(f"eval {base}", tables=[{"title": "", "columns": ["", *(n.replace("_", " ") for n in names)], "rows": rows}])]
    ).print()


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


# ---- texts -----------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def predict(model: Any, tokenizer: Any, data: Data, context: int, batch: int) -> dict[str, Any]:
    """Loss, bits per byte and next-token accuracy over all learnt tokens of a source."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room and context > room:
        raise UserError(f"--context {context} does not fit", f"the model has {room} positions", "lower --context")
    rows = tokenize(read(data), tokenizer, int(model.config.get_text_config().vocab_size), context)
    total, right, count = 0.0, 0, 0
    for i in range(0, len(rows), batch):
        part = collate([rows[j] for j in range(i, min(i + batch, len(rows)))])
        given = {k: v.to(model.device) for k, v in part.items() if k in ("input_ids", "attention_mask", "position_ids")}
        logits = model(**given, use_cache=False).logits[:, :-1].float()
        labels = part["labels"][:, 1:].to(logits.device)
        learnt = labels != IGNORE
        total += float(torch.nn.functional.cross_entropy(logits[learnt], labels[learnt], reduction="sum").double())
        right += int((logits.argmax(-1) == labels)[learnt].sum())
        count += int(learnt.sum())
    loss = total / count
    if not math.isfinite(loss):
        raise UserError(f"the loss on {data.path} is not finite", "the model gives NaN or infinity", "look at its weights")
    bits = {"bits_per_byte": loss / math.log(2) * rows.tokens / rows.bytes} if rows.bytes else {}
    return {**bits, "token_accuracy": right / count, "loss": loss, "tokens": count}


# ---- tasks with choices ----------------------------------------------------------------------------------------------
def _items(data: Data) -> list[tuple[str, list[str], int]]:
    """The items of a task file: prompt, choices, number of the right one; empty where the file is no task."""
    if is_text(data):
        return []
    names, values_of = read_table(data)
    if not set(_TASK) <= set(names):
        return []
    items = []
    for i, (prompt, choices, answer) in enumerate(zip(*map(values_of, _TASK), strict=True)):
        if data.limit and i >= data.limit:
            break
        choices = list(choices) if isinstance(choices, (list, tuple)) else []
        right = choices.index(answer) if answer in choices else answer
        text = isinstance(prompt, str) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
        if not text or isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
            raise UserError(
                f"item {i} of {data.path} is no question with choices",
                "it needs a prompt, two or more choices of text, and an answer: a number from 0, or one of the choices",
                "mend that row",
            )
        items.append((prompt, choices, right))
    if not items:
        raise UserError(f"{data.path} holds no items", how="give at least one")
    return items


@torch.inference_mode()
def choose(model: Any, tokenizer: Any, items: list[tuple[str, list[str], int]]) -> dict[str, Any]:
    """Accuracy by likelihood, by likelihood per byte, and their 95 % interval; prompts that were cut are counted."""
    sums, per_byte, cut = 0, 0, 0
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, choices, right in items:
        scores = []
        for choice in choices:
            score, short_of = _likelihood(model, tokenizer, prompt, choice, room)
            scores.append(score)
            cut += short_of
        sums += max(range(len(choices)), key=scores.__getitem__) == right
        norm = [s / len(c.encode()) for s, c in zip(scores, choices, strict=True)]
        per_byte += max(range(len(choices)), key=norm.__getitem__) == right
    n = len(items)
    low, high = wilson(sums, n)
    found = {"accuracy": sums / n, "accuracy_per_byte": per_byte / n, "items": n, "interval": [float(low), float(high)]}
    return found | ({"prompts_cut": cut} if cut else {})


def _likelihood(model: Any, tokenizer: Any, prompt: str, choice: str, room: int | None) -> tuple[float, bool]:
    """log p(choice | prompt), and whether the prompt lost its beginning at the context."""
    joined = prompt if not prompt or prompt[-1].isspace() or choice[0].isspace() else prompt + " "
    whole = tokenizer(joined + choice)["input_ids"]
    head = tokenizer(joined.rstrip())["input_ids"]
    n = len(whole) - sum(1 for _ in _common(head, whole))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if n == len(whole) and start is not None:
        whole = [start, *whole]
    n = min(n, len(whole) - 1)
    if room and n + 1 > room:
        raise UserError(f"the choice {choice[:40]!r} does not fit", f"it has {n} tokens and the model {room} positions", "shorten it")
    ids = torch.tensor([whole[-room:] if room else whole], device=model.device)
    logits = model(ids, use_cache=False).logits[0, -n - 1 : -1].float().log_softmax(-1)
    return float(logits.gather(1, ids[0, -n:, None]).sum()), bool(room and len(whole) > room)


def _common(a: list[int], b: list[int]) -> Any:
    """The ids with which both begin."""
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


# ---- lm-eval ---------------------------------------------------------------------------------------------------------
def harness(model: Any, tokenizer: Any, tasks: str, shots: int | None, limit: int | None, batch: int) -> dict[str, dict[str, Any]]:
    """Tasks of lm-eval on the model that is loaded. Raises UserError where the extra is not installed, or a task is unknown."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError("--tasks needs lm-eval", short(error), "pip install 'modelwright[eval]'") from None
    names = [t.strip() for t in tasks.split(",") if t.strip()]
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        done = simple_evaluate(model=wrapped, tasks=names, num_fewshot=shots, limit=limit)
    except (KeyError, ValueError, OSError) as error:  # an unknown task, or data that cannot be fetched
        raise UserError(f"lm-eval cannot run {', '.join(names)}", short(error), "`lm-eval ls tasks` lists its tasks") from None
    return {name: _numbers(row) for name, row in done["results"].items()}


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Its measures without the name of the filter: `acc,none` is acc."""
    return {k.removesuffix(",none"): v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
