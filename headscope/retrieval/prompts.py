"""Prompts for generation, from texts, tokens or a probe, in batches padded on the left."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.errors import InputError
from headscope.models.protocol import HeadModel
from headscope.probes.encoding import encode
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import bos_prefix, need_tokenizer

Prompts = Probe | str | Sequence[str] | Int[Tensor, "batch pos"]
_TOKENS_PER_PASS = 8192


def prompt_ids(model: HeadModel, prompts: Prompts) -> list[list[int]]:
    """Token ids of every prompt; those of a probe end at its mark ``end``, if it has one.

    Raises:
        InputError: if there is none, or one is empty or unknown to the model.
    """
    if isinstance(prompts, Probe):
        ids = _of_probe(prompts)
    elif isinstance(prompts, Tensor):
        ids = prompts.tolist()
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokenizer = need_tokenizer(model, "a prompt in words")
        ids = [encode(tokenizer, one, bos_prefix(model, None)).ids for one in texts]
    if not ids or not all(ids):
        raise InputError("give at least one prompt, and no empty one.")
    low, high = min(map(min, ids)), max(map(max, ids))
    if low < 0 or high >= model.shape.d_vocab:
        raise InputError(
            f"the prompts have token ids {low} to {high}, but {model.name} knows 0 to "
            f"{model.shape.d_vocab - 1}."
        )
    return ids


def _of_probe(probe: Probe) -> list[list[int]]:
    ends = probe.last
    if "end" in probe.marks:
        marked = probe.mark("end")
        ends = torch.where(marked.any(1), marked.int().argmax(1), ends)
    places = zip(probe.tokens, probe.first.tolist(), ends.tolist(), strict=True)
    return [row[first : end + 1].tolist() for row, first, end in places]


def check_room(model: HeadModel, prompts: list[list[int]], new_tokens: int) -> None:
    """Raise InputError if prompt and answer are more than the model takes."""
    if new_tokens < 1:
        raise InputError(f"new_tokens={new_tokens} leaves nothing to say: give 1 or more.")
    longest = max(map(len, prompts))
    if model.shape.n_ctx is not None and longest + new_tokens - 1 > model.shape.n_ctx:
        raise InputError(
            f"a prompt of {longest} tokens and {new_tokens} new ones are more than the "
            f"{model.shape.n_ctx} that {model.name} takes: shorten it, or ask for fewer."
        )


@dataclass(frozen=True, eq=False)
class Padded:
    """Some prompts as one batch; ``rows`` are their numbers."""

    rows: list[int]
    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]


def batches(prompts: list[list[int]], size: int | None) -> Iterator[Padded]:
    """Prompts of similar lengths together, padded on the left."""
    if size is not None and size < 1:
        raise InputError(f"batch_size={size} leaves nothing to run: give 1 or more.")
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    while order:
        longest = len(prompts[order[0]])
        count = size or max(1, _TOKENS_PER_PASS // longest)
        rows, order = order[:count], order[count:]
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        for at, row in enumerate(rows):
            ids = prompts[row]
            tokens[at, longest - len(ids) :] = torch.tensor(ids)
            real[at, longest - len(ids) :] = True
        yield Padded(rows, tokens, real)


@dataclass(frozen=True)
class Chooser:
    """Says the next token: the likeliest, or one drawn with a generator of each prompt's own.

    Attributes:
        temperature: 0 for the likeliest (of equals the lowest token).
        seed: of the draws; a prompt's draws do not depend on its neighbours in the batch.
    """

    temperature: float
    seed: int

    def __post_init__(self) -> None:
        """Check the temperature."""
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature} must be 0 (greedy) or more.")

    def __call__(
        self, logits: Float[Tensor, "batch d_vocab"], draws: list[Random]
    ) -> Int[Tensor, " batch"]:
        """Choose one token per row."""
        if self.temperature == 0:
            return (logits == logits.amax(1, keepdim=True)).int().argmax(1).cpu()
        shares = (logits.cpu().double() / self.temperature).softmax(1).cumsum(1)
        at = torch.tensor([one.random() for one in draws], dtype=torch.float64)[:, None]
        found = torch.searchsorted(shares, at * shares[:, -1:], right=True)
        return found[:, 0].clamp_max(logits.shape[1] - 1)

    def draws(self, rows: list[int]) -> list[Random]:
        """A source of numbers for each prompt."""
        return [Random(f"{self.seed} {row}") for row in rows]  # noqa: S311 - words, not secrets
