"""Greedy answers by vLLM on the CPU; the same request and answers as ask_transformers.py. Needs vLLM alone."""

import gc
import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)


def answer(folder, adapter, request):
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    more = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
    lora = LoRARequest("tuned", 1, adapter) if adapter else None
    model = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        num_gpu_blocks_override=64,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **more,
    )
    try:
        inner = model.llm_engine.model_config
        found = {"class": str(inner.architecture), "texts": [], "chats": []}
        plain = SamplingParams(temperature=0, max_tokens=request["n"], logprobs=1, ignore_eos=True)
        for out in model.generate(request["prompts"], plain, use_tqdm=False, lora_request=lora):
            found["texts"].append(one(out))
        if request["chats"] and model.get_tokenizer().chat_template:
            chat = SamplingParams(temperature=0, max_tokens=request["n"], logprobs=1)
            found["chats"] = [one(out) for out in model.chat(request["chats"], chat, use_tqdm=False, lora_request=lora)]
        return found
    finally:
        del model
        cleanup_dist_env_and_memory()
        gc.collect()


def one(out):
    first = out.outputs[0]
    ids = list(first.token_ids)
    return {
        "ids": ids,
        "logprobs": [place[i].logprob for i, place in zip(ids, first.logprobs, strict=True)],
        "text": first.text,
        "ended": first.finish_reason,
        "begin": len(out.prompt_token_ids),
    }


def main():
    request = json.load(sys.stdin)
    os.environ["VLLM_PLUGINS"] = "modelwright" if request["ours"] else "none"
    channel = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    import vllm

    for folder, adapter in request["asked"]:
        gc.freeze()  # vLLM collects garbage often, and the hundreds of thousands of objects of its imports stay
        print(json.dumps({"begins": folder}), file=channel, flush=True)
        try:
            found = answer(folder, adapter, request)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        print(json.dumps({"version": vllm.__version__, **found}), file=channel, flush=True)


if __name__ == "__main__":
    main()
