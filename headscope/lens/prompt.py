"""A prompt and the tokens that are asked about, checked before any compute."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headscope import probes
from headscope.errors import InputError
from headscope.models.protocol import HeadModel
from headscope.probes.encoding import encode
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import bos_prefix, check_length, need_tokenizer

Promptish = str | Sequence[int] | Int[Tensor, " pos"]
Token = str | int


@dataclass(frozen=True, eq=False)
class Prompt:
    """One text as the model reads it.

    Attributes:
        ids: token ids, BOS included where the model's tokenizer puts one.
        texts: of the tokens; numbers where there is no tokenizer.
    """

    ids: Int[Tensor, " pos"]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.texts)

    @property
    def probe(self) -> Probe:
        """The prompt as a probe of one example."""
        return probes.from_tokens(self.ids[None])

    def at(self, position: int) -> int:
        """Position counted from the front.

        Raises:
            InputError: if the prompt has no such position.
        """
        if not -len(self) <= position < len(self):
            raise InputError(
                f"the prompt has {len(self)} tokens: positions 0 to {len(self) - 1}, or -1 for the "
                f"last; not {position}."
            )
        return position % len(self)


def read_prompt(model: HeadModel, prompt: Promptish) -> Prompt:
    """Tokenize a text, or take ids as they are.

    Raises:
        InputError: if it is empty, too long for the model, or there is no tokenizer.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError("the prompt is empty: give at least one word.")
        if model.tokenizer is None:
            raise InputError(
                f"{model.name} has no tokenizer, so it cannot read text: give token ids instead."
            )
        ids = encode(need_tokenizer(model, "a prompt"), prompt, bos_prefix(model, None)).ids
        if not ids:  # transformers makes an empty tokenizer where a folder has none
            raise InputError(
                f"the tokenizer of {model.name} makes no token of the prompt: there is none in its "
                "folder, or an empty one. Give token ids instead."
            )
    else:
        if not isinstance(prompt, Iterable):
            raise InputError(f"prompt={prompt!r}: give a text, or its token ids.")
        ids = [int(one) for one in prompt]
    if not ids:
        raise InputError("the prompt is empty: give at least one token.")
    wrong = [one for one in ids if not 0 <= one < model.shape.d_vocab]
    if wrong:
        raise InputError(
            f"{model.name} has no token {wrong[0]}: it knows 0 to {model.shape.d_vocab - 1}."
        )
    check_length(model, len(ids), what="the prompt", fix="shorten it")
    return Prompt(torch.tensor(ids), tuple(token_texts(model.tokenizer, ids)))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Texts of tokens, one by one; their numbers where there is no tokenizer."""
    if tokenizer is None:
        return [str(one) for one in ids]
    known = {one: str(tokenizer.decode([one])) for one in set(ids)}
    return [known[one] for one in ids]


def read_token(model: HeadModel, token: Token, what: str = "target") -> int:
    """Id of one token, given as itself or as text.

    Raises:
        InputError: if the text is not exactly one token, or the id does not exist.
    """
    if isinstance(token, str):
        if model.tokenizer is None:
            raise InputError(f"{model.name} has no tokenizer: give the {what} as a token id.")
        ids = list(model.tokenizer(token, add_special_tokens=False)["input_ids"])
        if len(ids) != 1:
            pieces = token_texts(model.tokenizer, ids)
            raise InputError(
                f"the {what} {token!r} is {len(ids)} tokens for {model.name} ({pieces}), and one "
                "is needed; mind the space in front."
            )
        return int(ids[0])
    if not 0 <= int(token) < model.shape.n_logits:
        raise InputError(
            f"{model.name} has no logit of token {token}: it has those of 0 to "
            f"{model.shape.n_logits - 1}."
        )
    return int(token)
