"""A tiny masked language model with a tokenizer of its own, for tests."""

from pathlib import Path
from typing import Any

import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from families import model_of


def tokenizer_of(texts: list[str], vocab: int = 90) -> Any:
    """WordPiece as BERT has it."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=list(special.values()), show_progress=False)
    words.train_from_iterator(texts, trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return T.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def saved(folder: Path, texts: list[str], **changes: Any) -> Path:
    """A tiny BERT with its tokenizer."""
    model_of("bert", pad_token_id=0, **changes).save_pretrained(folder)
    tokenizer_of(texts).save_pretrained(folder)
    return folder
