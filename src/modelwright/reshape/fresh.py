"""An untrained Llama and its own tokenizer: where a model that is trained from nothing begins.

The tokenizer is a byte-level BPE trained on the data (nothing is ever unknown to it; one special token ends a text).
Weights are transformers' own initialisation. Ours; no paper.
`norm` places the norms: pre is Llama; mix is Mix-LN (2412.13795): post in the first `alpha` of the blocks and pre in the others, against
deep blocks that hardly learn; post and output (OLMo 2) for comparison. All but pre (and mix with alpha 0) are saved as "mix_ln".
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from modelwright.core.data.read import read
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, knob
from modelwright.core.model.writer import Built

END = "<|endoftext|>"


@dataclass(frozen=True)
class Knobs:
    data: Data = knob(Data(), "text that the tokenizer is trained on")
    vocab: int = knob(2048, "tokens, the end token included", low=257)
    hidden: int = knob(128, "width of the residual stream", low=8)
    layers: int = knob(4, "blocks", low=1)
    heads: int = knob(4, "attention heads", low=1)
    kv_heads: int = knob(2, "key and value heads", low=1)
    ffn: int = knob(344, "neurons of the feed-forward part", low=8)
    context: int = knob(512, "positions", low=8)
    tied: bool = knob(True, "one matrix for embeddings and output")
    norm: Literal["pre", "post", "mix", "output"] = knob("pre", "place of the norms")
    alpha: float = knob(0.25, "mix: share of the blocks, from the first, that are post", low=0, high=1)


def fresh(source: None, knobs: Knobs, seed: int = 0) -> tuple[Built, str]:
    """The model and tokenizer, built in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from modelwright.models.mix_ln import MixLNConfig, MixLNForCausalLM, placements

    if knobs.hidden % (2 * knobs.heads) or knobs.heads % knobs.kv_heads:
        raise UserError(
            f"hidden={knobs.hidden}, heads={knobs.heads} and kv_heads={knobs.kv_heads} do not fit together",
            "each head needs an even width and each key head as many query heads",
            "make hidden a multiple of twice the heads, and heads a multiple of kv_heads",
        )
    documents = read(knobs.data)
    if not isinstance(documents[0], str):
        raise UserError(
            f"{knobs.data.path} holds no plain text", "a tokenizer is learnt from text", "give text, or a table with a column of text"
        )
    tokenizer = train_tokenizer(documents, knobs.vocab, knobs.context)
    places = placements(knobs.layers, knobs.norm, knobs.alpha)
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": knobs.hidden,
        "intermediate_size": knobs.ffn,
        "num_hidden_layers": knobs.layers,
        "num_attention_heads": knobs.heads,
        "num_key_value_heads": knobs.kv_heads,
        "max_position_embeddings": knobs.context,
        "tie_word_embeddings": knobs.tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    if set(places) == {"pre"}:
        return Built(LlamaForCausalLM(LlamaConfig(**values)), tokenizer), "changed function"
    return Built(MixLNForCausalLM(MixLNConfig(norm_placement=places, **values)), tokenizer), "changed function"


def train_tokenizer(documents: list[str], vocab: int, context: int) -> Any:
    """A byte-level BPE with digits one by one and runs of spaces kept whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=context)


METHOD = fresh
