"""Tiny encoder-decoders with a tokenizer of their own, for tests of methods that learn pairs."""

from pathlib import Path
from typing import Any

import torch
import transformers as T
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers


def tokenizer_of(texts: list[str], vocab: int = 200, sentinels: int = 0) -> Any:
    """Subwords as SentencePiece makes them: NFKC, runs of white space become one; </s> at the end; sentinels at the end, counting down."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab - sentinels, special_tokens=special, show_progress=False))
    words.add_special_tokens([AddedToken(f"<extra_id_{i}>", normalized=False) for i in reversed(range(sentinels))])
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def saved(folder: Path, texts: list[str], *, vocab: int = 200, sentinels: int = 0, seed: int = 0, **changes: Any) -> Path:
    """A tiny T5 with its tokenizer; `changes` go into its config."""
    tokenizer = tokenizer_of(texts, vocab, sentinels)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0} | changes
    torch.manual_seed(seed)
    config = T.T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **size)
    model = T.T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
