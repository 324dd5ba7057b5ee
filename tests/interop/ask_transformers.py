"""Greedy answers by transformers, of whatever version runs this file. Needs transformers and torch alone.

A request comes on standard input (see run.py). Standard output has a line {"begins"} before each folder and its answer after it.
"""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)


@torch.no_grad()
def greedy(model, ids, n, ends=None):
    """Token ids, their log-probabilities, and at each place how far the second best was behind."""
    length, begin = ids.shape[1], ids.shape[1]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )
    scores = torch.cat(out.logits).float().log_softmax(-1)
    found = out.sequences[0, length:]
    best = scores.topk(2).values
    return {
        "ids": found.tolist(),
        "logprobs": scores[torch.arange(len(found)), found].tolist(),
        "margin": (best[:, 0] - best[:, 1]).tolist(),
        "ended": "stop" if ends is not None and int(found[-1]) in (ends if isinstance(ends, list) else [ends]) else "length",
        "begin": begin,
    }


def answer(folder, adapter, request):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model = model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    found = {"class": type(model).__name__, "notes": {k: sorted(map(str, v))[:4] for k, v in info.items() if v}, "texts": [], "chats": []}
    for text in request["prompts"]:
        one = greedy(model, tokenizer(text, return_tensors="pt", add_special_tokens=True)["input_ids"], request["n"])
        found["texts"].append(one | {"text": tokenizer.decode(one["ids"])})
    for chat in request["chats"] if getattr(tokenizer, "chat_template", None) else []:
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        one = greedy(model, ids, request["n"], model.generation_config.eos_token_id)
        found["chats"].append(one | {"text": tokenizer.decode(one["ids"], skip_special_tokens=True)})
    return found


def main():
    request = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    if request["ours"]:
        import modelwright.models  # noqa: F401
    transformers.logging.set_verbosity_error()
    for folder, adapter in request["asked"]:
        print(json.dumps({"begins": folder}), file=channel, flush=True)
        try:
            found = answer(folder, adapter, request)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        print(json.dumps({"version": transformers.__version__, **found}), file=channel, flush=True)


if __name__ == "__main__":
    main()
