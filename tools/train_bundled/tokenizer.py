"""The shared tokenizer: the 256 bytes, and the words of the generated texts as whole tokens."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from headscope.models.bundled import PUNCTUATION, all_words

BOS = "<|bos|>"
START_WORDS = ("The", "the", "When", "After", "One", "Question", "Answer", "A", "It", "In")


def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer; the same call gives the same tokenizer.

    Any text can be encoded (all 256 bytes are in the vocabulary), every word of `text.py` is one
    token after a space, and `<|bos|>` is put in front unless special tokens are switched off.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = [f" {word}" for word in (*all_words(), *PUNCTUATION)] + list(START_WORDS)
    pieces = sorted({piece.replace(" ", "Ġ") for piece in whole} - set(letters))
    vocabulary = [(BOS, 0.0), *((letter, -10.0) for letter in letters)]
    vocabulary += [(piece, -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def save_tokenizer(folder: Path, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    build_tokenizer(context).save_pretrained(folder)
