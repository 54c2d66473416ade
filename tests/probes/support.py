"""Models as probes see them: a tokenizer made on the spot, or a real one where it is found."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headscope.heads import ModelShape
from headscope.probes.pairs import _TEMPLATES, _WORDS

REAL = Path(__file__).parents[3] / "shared" / "tokenizers"


def shape_of(d_vocab: int, n_ctx: int | None = 256) -> ModelShape:
    return ModelShape(1, 2, 2, 8, 4, d_vocab, n_ctx, (0,), (None,))


@dataclass
class Reader:
    """The part of a model that probes look at."""

    tokenizer: Any
    shape: ModelShape = field(default_factory=lambda: shape_of(40))
    name: str = "a test model"


@lru_cache
def small_tokenizer(bos: bool = True, words: str = "all") -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words of the IOI prompts, or none of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000 if words == "all" else 300,
        special_tokens=["<s>", "<reserved>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [f" {word}" for group in _WORDS.values() for word in group.split()] + [
        " ".join(_TEMPLATES)
    ]
    tokenizer.train_from_iterator(corpus * 4 if words == "all" else ["x"], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    special = dict.fromkeys(("bos_token", "eos_token"), "<s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def reader(bos: bool = True, words: str = "all", n_ctx: int | None = 256, extra: int = 8) -> Reader:
    """A model with a small tokenizer and ``extra`` padding rows in its embedding."""
    tokenizer = small_tokenizer(bos, words)
    return Reader(tokenizer, shape_of(len(tokenizer) + extra, n_ctx))


def real_reader(name: str) -> Reader:
    """A model with a public tokenizer; skips where that is not found."""
    if not (REAL / name).is_dir():
        pytest.skip(f"no tokenizer at {REAL / name}")
    tokenizer = AutoTokenizer.from_pretrained(REAL / name)
    return Reader(tokenizer, shape_of(50304, 1024), name)
