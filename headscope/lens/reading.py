"""Prompts, and states decoded in the vocabulary in chunks: [layer pos vocab] is never kept."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope import probes
from headscope.errors import InputError, whole
from headscope.heads import ModelShape
from headscope.models.protocol import HeadModel
from headscope.models.taps import BlockStates, Reads, at_blocks, at_final
from headscope.probes.encoding import bos_prefix, check_length, encode, need_tokenizer
from headscope.probes.probe import Probe
from headscope.views import Unembedding

# Entries of one chunk of logits, and of one block of the unembedding in fp32: 64 MB.
_ENTRIES = 1 << 24


class Top(NamedTuple):
    """The largest values of each row, largest first; on ties the lowest index first."""

    values: Float[Tensor, "row k"]
    ids: Int[Tensor, "row k"]


def row_chunks(rows: int, unembedding: Unembedding) -> Iterator[slice]:
    """Ranges of rows whose logits fit a chunk."""
    step = max(1, _ENTRIES // unembedding.W_U.shape[0])
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def logits_of(
    unembedding: Unembedding, residual: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row d_vocab"]:
    """Logits of residual streams, each through its own final norm, with soft cap."""
    logits = _over_vocabulary(
        unembedding, unembedding.normed(residual), lambda block: unembedding.W_U[block]
    )
    if unembedding.b_U is not None:
        logits = logits + unembedding.b_U.float()
    return unembedding.capped(logits * unembedding.logit_scale)


def logits_added(
    unembedding: Unembedding, writes: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row d_vocab"]:
    """Logits that writes, already divided by the final norm's scale, add to the stream's."""

    def directions(block: slice) -> Tensor:
        return unembedding.directions(_ids(unembedding)[block])

    return _over_vocabulary(unembedding, writes, directions)


def constants(unembedding: Unembedding) -> Float[Tensor, " d_vocab"]:
    """Part of every logit that does not depend on the residual stream."""
    step = max(1, _ENTRIES // unembedding.W_U.shape[1])
    return torch.cat([unembedding.constant(block) for block in _ids(unembedding).split(step)])


def _ids(unembedding: Unembedding) -> Int[Tensor, " d_vocab"]:
    return torch.arange(unembedding.W_U.shape[0], device=unembedding.W_U.device)


def _over_vocabulary(
    unembedding: Unembedding, rows: Tensor, vectors: Callable[[slice], Tensor]
) -> Float[Tensor, "row d_vocab"]:
    size, width = unembedding.W_U.shape
    step = max(1, _ENTRIES // width)
    starts = range(0, size, step)
    parts = [rows @ vectors(slice(at, min(at + step, size))).float().T for at in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def top_of(values: Float[Tensor, "row d_vocab"], k: int) -> Top:
    """The k largest values of each row, with ties broken by index, unlike torch's."""
    k = min(k, values.shape[1])
    least = values.topk(k, dim=1).values[:, -1:]
    above = values > least
    level = values == least
    wanted = k - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1) <= wanted))
    ids = chosen.nonzero()[:, 1].view(len(values), k)
    found = values.gather(1, ids)
    order = found.sort(dim=1, descending=True, stable=True).indices
    return Top(found.gather(1, order), ids.gather(1, order))


def rank_of(
    values: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """Number of tokens above the target; on ties the lowest id ranks higher."""
    own = values.gather(1, tokens[:, None])
    lower = torch.arange(values.shape[1], device=values.device)[None] < tokens[:, None]
    return ((values > own) | ((values == own) & lower)).sum(1)


SITES = ("residual", "attention", "mlp")


def row_names(n_layers: int) -> tuple[str, ...]:
    """Names of places in the residual stream from the bottom up; the last is the model's output."""
    return ("embedding", *(f"L{layer}" for layer in range(n_layers)))


@dataclass
class States:
    """Reader that keeps chosen positions of chosen sites, by site and place, in layer order.

    Attributes:
        example, position: example and position of each row.
        sites: sites to read.
        rows: stored values, in fp32.
        final: input of the final norm.
    """

    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    sites: tuple[str, ...] = ("residual",)
    rows: dict[str, dict[str, Float[Tensor, "row d_model"]]] = field(default_factory=dict)
    final: Float[Tensor, "row d_model"] = field(default_factory=lambda: torch.empty(0, 0))

    def __post_init__(self) -> None:
        """Allocate the rows."""
        self.rows = {site: {} for site in self.sites}

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: every block, and the input of the final norm."""
        return at_blocks(shape, self._on_block) | at_final(self._on_final)

    def _on_block(self, states: BlockStates) -> None:
        """Store the chosen sites."""
        name = f"L{states.layer}"
        at = (self.example, self.position)
        if "residual" in self.sites:
            if states.layer == 0:
                self.rows["residual"]["embedding"] = states.entering[at].float()
            self.rows["residual"][name] = states.leaving[at].float()
        if "attention" in self.sites and states.attention is not None:
            self.rows["attention"][name] = states.attention[at].float()
        if "mlp" in self.sites:
            self.rows["mlp"][name] = states.mlp[at].float()

    def _on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Store the input of the final norm."""
        self.final = residual[self.example, self.position].float()


Promptish = str | Sequence[int] | Int[Tensor, " pos"]
Token = str | int


@dataclass(frozen=True, eq=False)
class Prompt:
    """One tokenized text.

    Attributes:
        ids: token ids, with a BOS if the model's tokenizer adds one.
        texts: texts of the tokens; numbers if there is no tokenizer.
    """

    ids: Int[Tensor, " pos"]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.texts)

    @property
    def probe(self) -> Probe:
        """The prompt as a probe with one example."""
        return probes.from_tokens(self.ids[None])

    def at(self, position: int) -> int:
        """Resolve a position that may count from the end.

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
    """Tokenize a text, or accept token ids.

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
        if not ids:  # transformers creates an empty tokenizer if a folder has none
            raise InputError(
                f"the tokenizer of {model.name} returns no token for the prompt: its folder has "
                "no tokenizer, or an empty one. Give token ids instead."
            )
    else:
        if not isinstance(prompt, Iterable):
            raise InputError(f"prompt={prompt!r}: give a text, or its token ids.")
        given = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        ids = [whole(one, "a token of the prompt") for one in given]
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
    """Texts of single tokens; their numbers if there is no tokenizer."""
    if tokenizer is None:
        return [str(one) for one in ids]
    known = {one: str(tokenizer.decode([one])) for one in set(ids)}
    return [known[one] for one in ids]


def read_token(model: HeadModel, token: Token, what: str = "target") -> int:
    """Id of a token, given as an id or as text.

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
                f"the {what} {token!r} is {len(ids)} tokens for {model.name} ({pieces}), but "
                "must be one: check its leading space."
            )
        return int(ids[0])
    if not 0 <= int(token) < model.shape.n_logits:
        raise InputError(
            f"{model.name} has no logit of token {token}: it has those of 0 to "
            f"{model.shape.n_logits - 1}."
        )
    return int(token)
