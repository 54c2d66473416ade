"""Texts with hidden tokens, for models that fill them in."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.errors import InputError, UnsupportedModelError
from headscope.probes.probe import Probe
from headscope.probes.text import text
from headscope.probes.vocabulary import HasVocabulary, reads_onwards

_SHARE = 0.15


def masked(
    model: HasVocabulary,
    source: str | Path | Sequence[str] | Probe | None = None,
    count: int | None = None,
    *,
    at: str | None = None,
    mask_token: int | None = None,
    length: int | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> Probe:
    """Texts in which some tokens are hidden; targets are the tokens that stood there.

    Position i predicts the token of position i: nothing is shifted. Hidden positions have the mark
    ``masked`` and are the only ones with a target, so that every metric reads those alone;
    ``structure`` keeps the original tokens. Every hidden token becomes the mask token (Devlin et
    al. 2019, arXiv 1810.04805, also leave some as they are, or put random tokens, in training).

    Args:
        model: an encoder with a masked-language-model head.
        source: texts or a file, as :func:`headscope.probes.text` takes them, or a probe.
        count: tokens hidden in each example; default: 15% of those that may be, at least one.
        at: mark of the positions that may be hidden; default: all but special tokens.
        mask_token: id that stands for a hidden token; default: the tokenizer's.
        length: tokens of a piece of text, see :func:`headscope.probes.text`.
        batch: examples drawn from the texts.
        seed: of the draw of positions, and of examples where ``batch`` is given.

    Raises:
        InputError: if an example has fewer tokens that may be hidden than are to be, or there is
            no mask token.
        UnsupportedModelError: if the model predicts next tokens.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
        >>> small |= {"num_attention_heads": 2, "intermediate_size": 16}
        >>> encoder = hs.load(BertForMaskedLM(BertConfig(**small)).eval())
        >>> probe = hs.probes.masked(encoder, hs.probes.random_tokens(encoder, 12), 2, mask_token=3)
        >>> (probe.targets >= 0).sum(1).tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]
    """
    if reads_onwards(model):
        raise UnsupportedModelError(
            f"{model.name} reads from left to right and was not trained to fill in hidden tokens: "
            "use hs.probes.text, whose targets are the next tokens."
        )
    if count is not None and count < 1:
        raise InputError(f"count={count} hides nothing: give 1 or more.")
    token = _mask_token(model, mask_token)
    if isinstance(source, Probe):
        if length is not None or batch is not None:
            raise InputError("length and batch choose among texts: leave them out for a probe.")
        whole = source
    else:
        whole = text(model, source, length, batch, seed)
    hidden = _drawn(_may_be_hidden(model, whole, at, token), count, seed)
    return replace(
        whole,
        tokens=whole.tokens.masked_fill(hidden, token),
        targets=whole.tokens.where(hidden, -1),
        next_token=False,
        foils=None,
        marks={**whole.marks, "masked": hidden},
        name="masked",
        seed=seed,
        settings={**whole.settings, "count": count, "at": at, "mask_token": token},
        control=None,
        corrupt=None,
    )


def _mask_token(model: HasVocabulary, given: int | None) -> int:
    """Id of the mask token.

    Raises:
        InputError: if there is none, or the model does not know it.
    """
    token = getattr(model.tokenizer, "mask_token_id", None) if given is None else given
    if token is None:
        raise InputError(
            f"the tokenizer of {model.name} has no mask token: give its id, mask_token=."
            if model.tokenizer is not None
            else f"{model.name} has no tokenizer: give the id of its mask token, mask_token=."
        )
    if not 0 <= token < model.shape.d_vocab:
        raise InputError(
            f"mask_token={token}: {model.name} knows tokens 0 to {model.shape.d_vocab - 1}."
        )
    return int(token)


def _may_be_hidden(
    model: HasVocabulary, probe: Probe, at: str | None, token: int
) -> Bool[Tensor, "batch pos"]:
    """Real positions that hold no special token, or those with a mark."""
    if at is not None:
        return probe.mark(at) & probe.real
    special = [token, *([] if model.tokenizer is None else model.tokenizer.all_special_ids)]
    return probe.real & ~torch.isin(probe.tokens, torch.tensor(special))


def _drawn(
    candidates: Bool[Tensor, "batch pos"], count: int | None, seed: int
) -> Bool[Tensor, "batch pos"]:
    """Some of the candidates of every example."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.zeros_like(candidates)
    for number, row in enumerate(candidates, 1):
        places: Int[Tensor, " place"] = row.nonzero().squeeze(1)
        wanted = max(1, round(_SHARE * len(places))) if count is None else count
        if len(places) < wanted:
            raise InputError(
                f"example {number} has {len(places)} tokens that may be hidden, and {wanted} were "
                "asked for: give longer texts, or a smaller count."
            )
        order = torch.randperm(len(places), generator=generator)[:wanted]
        hidden[number - 1, places[order]] = True
    return hidden
