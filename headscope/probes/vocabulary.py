"""What probes need to know of a model: its vocabulary, its limit, and whether it reads a BOS."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from headscope.base.stacks import all_causal
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import ModelShape


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that probes use.

    Apart from ``bos_token_id``, which transformers makes up when it is asked for: from Python 3.12
    on a protocol does not see such attributes.
    """

    @property
    def is_fast(self) -> bool:
        """Whether it can report character offsets."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of BOS, EOS, padding and the like."""

    def __call__(self, text: str, **options: object) -> Mapping[str, Any]:
        """Tokenize one text."""

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Messages as the model was trained to read them."""

    def batch_decode(self, sequences: list[list[int]], **options: object) -> list[str]:
        """Texts of lists of ids."""


@runtime_checkable
class HasVocabulary(Protocol):
    """The part of a model that probes look at; every ``HeadModel`` has it."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def shape(self) -> ModelShape:
        """Gives ``n_ctx`` and ``d_vocab``."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """A Hugging Face tokenizer, or None."""


def uses_bos(model: HasVocabulary) -> bool:
    """Whether the model's own tokenizer puts a BOS token in front of a text.

    That is what the model saw in training. GPT-2 and GPT-NeoX name a BOS token but do not
    prepend it, so this is False for them; transformer-lens prepends it all the same, and
    ``bos=True`` does so here.

    Example:
        >>> hs.probes.uses_bos(model)
        True
    """
    tokenizer, bos = model.tokenizer, _bos(model)
    if tokenizer is None or bos is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == bos


def bos_prefix(model: HasVocabulary, bos: bool | None) -> list[int]:
    """Tokens to put in front of every example: the BOS or nothing.

    Args:
        model: whose tokenizer names the BOS.
        bos: whether to use it; None asks :func:`uses_bos`.

    Raises:
        InputError: if it is asked for and there is none.
    """
    if not (uses_bos(model) if bos is None else bos):
        return []
    token = _bos(model)
    if token is None:
        raise InputError(f"{model.name} has no BOS token; leave bos=True out.")
    return [token]


def frame(model: HasVocabulary, bos: bool | None) -> tuple[list[int], list[int]]:
    """Tokens to put before and after every example.

    A model that reads from left to right may have a BOS before; an encoder has what its tokenizer
    puts around a text, ``[CLS]`` and ``[SEP]``.

    Args:
        model: whose tokenizer is asked.
        bos: whether to use them; None does what the tokenizer does.

    Raises:
        InputError: if they are asked for and there are none.
    """
    if reads_onwards(model):
        return bos_prefix(model, bos), []
    if bos is False or model.tokenizer is None:
        around: tuple[list[int], list[int]] = [], []
    else:
        framed = list(model.tokenizer("a")["input_ids"])
        bare = list(model.tokenizer("a", add_special_tokens=False)["input_ids"])
        places = [at for at in range(len(framed)) if bare and framed[at : at + len(bare)] == bare]
        at = places[0] if places else min(1, len(framed))
        around = framed[:at], framed[at + len(bare) :]
    if bos and not any(around):
        raise InputError(f"{model.name} puts no tokens around a text; leave bos=True out.")
    return around


def reads_onwards(model: HasVocabulary) -> bool:
    """Whether a model reads from left to right, so that it predicts the next token."""
    return all_causal(getattr(model, "stacks", {}))


def need_onwards(model: HasVocabulary, what: str) -> None:
    """Refuse a probe whose answers follow its texts for a model that sees whole texts at once.

    Raises:
        UnsupportedModelError: naming the probe.
    """
    if not reads_onwards(model):
        raise UnsupportedModelError(
            f"{what} asks for the token after a text, and {model.name} reads texts in both "
            "directions: use hs.probes.masked."
        )


def _bos(model: HasVocabulary) -> int | None:
    token = getattr(model.tokenizer, "bos_token_id", None)
    return None if token is None else int(token)


def ordinary_tokens(model: HasVocabulary) -> Int[Tensor, " ordinary"]:
    """Ids that stand for text: in the tokenizer, in the embedding, with a logit, and not special.

    Rows that pad the embedding beyond the tokenizer, and reserved special tokens, were never
    trained and are left out. Without a tokenizer every id counts.
    """
    known = min(model.shape.d_vocab, model.shape.n_logits)
    if model.tokenizer is None:
        return torch.arange(known)
    special = set(model.tokenizer.all_special_ids)
    added = getattr(model.tokenizer, "added_tokens_decoder", {})
    special |= {token_id for token_id, token in added.items() if token.special}
    ids = set(model.tokenizer.get_vocab().values()) - special
    return torch.tensor(sorted(i for i in ids if 0 <= i < known))


def check_length(model: HasVocabulary, length: int, *, what: str, fix: str) -> None:
    """Refuse, before any forward pass, what does not fit the model's context.

    Raises:
        InputError: naming the length, the limit and the fix.
    """
    limit = model.shape.n_ctx
    if limit is not None and length > limit:
        raise InputError(
            f"{what} is {length} tokens long, {model.name} reads at most {limit}: {fix}."
        )


def need_tokenizer(model: HasVocabulary, what: str) -> Tokenizer:
    """Return the tokenizer, which must be able to say where in the text each token is.

    Raises:
        InputError: if there is none, or it cannot.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{what} needs a tokenizer and {model.name} has none: "
            "use repeated_tokens or from_tokens."
        )
    if not getattr(model.tokenizer, "is_fast", False):
        raise InputError(
            f"{what} needs a tokenizer that reports character offsets and that of "
            f"{model.name} does not: load it with use_fast=True."
        )
    return model.tokenizer
