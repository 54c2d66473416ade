"""Step-by-step generation with taps on each attention layer."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Not from typing: before Python 3.12 that one computes every property of what it checks.
from typing_extensions import Protocol, runtime_checkable

from headscope.edits import Span
from headscope.errors import UnsupportedModelError
from headscope.models.hf.model import HFModel
from headscope.models.hf.taps import Pass
from headscope.models.hf.transformers_api import is_stateful
from headscope.models.protocol import Edit, HeadModel
from headscope.models.running import accepted, padding
from headscope.models.taps import Read, Texts, writes_of

_NOTHING: Mapping[Any, Read] = MappingProxyType({})


@runtime_checkable
class Decoding(Protocol):
    """A growing text: the first step reads the prompt, each further step the appended tokens."""

    @property
    def length(self) -> int:
        """Number of positions read so far, including left padding."""

    def step(
        self,
        tokens: Int[Tensor, "batch new"],
        *,
        reads: Mapping[Any, Read] = _NOTHING,
        edits: Sequence[Edit] = (),
    ) -> Float[Tensor, "batch d_vocab"]:
        """Read further tokens and return the next-token logits.

        ``reads`` see the new queries, at positions counted among all keys; ``edits`` apply to this
        step only.
        """


def decoding(
    model: HeadModel,
    real: Bool[Tensor, "batch pos"] | None = None,
    *,
    prompt: int | None = None,
) -> Decoding:
    """Start generating with a model.

    With transformers' fused attention, each step caches keys and values and reads only the new
    tokens. A transformer-lens bridge, and hybrids whose other layers have recurrent states, read
    the whole text again at each step, which gives the same numbers more slowly.

    Args:
        model: model to generate with; pass edits to each step, not through a scope around it.
        real: padding mask of the prompt, False at padding, which must be on the left.
        prompt: length of the prompt; later positions count as decoding for edits with a scope.
            Default: the length of the first step.

    Raises:
        UnsupportedModelError: if the model caches more than keys and values, or is bidirectional.
    """
    need_continuing(model)
    if isinstance(model, HFModel):
        if is_stateful(model.module):
            raise UnsupportedModelError(
                f"{model.name} keeps a recurrent state besides keys and values: its generation "
                "cannot be followed; use the teacher-forced form."
            )
        if len(model.shape.attention_layers) == model.shape.n_layers:
            return _Cached(model, real, prompt)
    return _Repeated(model, real, prompt)


def need_continuing(model: HeadModel) -> None:
    """Raise if a model cannot continue texts.

    Raises:
        UnsupportedModelError: for an encoder.
    """
    if (reason := model.limits.get("causal")) is not None:
        raise UnsupportedModelError(f"nothing can be generated: {reason}")


def end_tokens(model: HeadModel) -> frozenset[int]:
    """End-of-sequence tokens; none without a tokenizer.

    Includes those of the model's generation config, where chat models list the token that ends a
    turn.
    """
    if model.tokenizer is None:
        return frozenset()
    config = getattr(getattr(model, "module", None), "generation_config", None)
    found: set[int] = set()
    for source in (model.tokenizer, config):
        named = getattr(source, "eos_token_id", None)
        found |= set(named if isinstance(named, list | tuple) else [named]) - {None}
    return frozenset(found)


class _Cached:
    """Decoding with cached keys and values, including those outside a layer's window."""

    def __init__(self, model: HFModel, real: Tensor | None, prompt: int | None) -> None:
        from transformers import DynamicCache

        self._prompt = prompt
        self._model, self._cache, self._length = model, DynamicCache(), 0
        self._arguments = accepted(model.module)
        self._real = None if real is None or bool(real.all()) else real.to(model.device)

    @property
    def length(self) -> int:
        return self._length

    def step(
        self,
        tokens: Int[Tensor, "batch new"],
        *,
        reads: Mapping[Any, Read] = _NOTHING,
        edits: Sequence[Edit] = (),
    ) -> Float[Tensor, "batch d_vocab"]:
        model = self._model
        tokens = tokens.to(model.device)
        # An all-real mask changes nothing but avoids padding warnings of some families.
        every = torch.ones(len(tokens), self._length + tokens.shape[1], dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": every.to(tokens.device)}
        if self._real is not None:
            self._real = _extended(self._real, self._length, tokens)
            inputs |= padding(self._real, self._arguments, turns_at=model.shape.turns_at)
            if "position_ids" in inputs:
                inputs["position_ids"] = inputs["position_ids"][:, self._length :]
        if "logits_to_keep" in self._arguments:
            inputs["logits_to_keep"] = 1
        self._prompt = tokens.shape[1] if self._prompt is None else self._prompt
        span = Span(self._length, tokens.shape[1], self._prompt, grows=True, real=self._real)
        run = Pass(model, *model.taps(reads, writes_of(edits)), span)
        with run.attached(), torch.no_grad():
            out = model.module(**inputs, past_key_values=self._cache, use_cache=True)
        self._length += tokens.shape[1]
        logits: Tensor = out.logits[:, -1]
        return logits


class _Repeated:
    """Decoding that reads the whole text again at each step."""

    def __init__(self, model: HeadModel, real: Tensor | None, prompt: int | None) -> None:
        self._model, self._real, self._prompt = model, real, prompt
        self._tokens: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self._tokens is None else int(self._tokens.shape[1])

    def step(
        self,
        tokens: Int[Tensor, "batch new"],
        *,
        reads: Mapping[Any, Read] = _NOTHING,
        edits: Sequence[Edit] = (),
    ) -> Float[Tensor, "batch d_vocab"]:
        if self._real is not None:
            self._real = _extended(self._real, self.length, tokens)
        grown = tokens if self._tokens is None else torch.cat([self._tokens, tokens], 1)
        self._tokens = grown
        self._prompt = grown.shape[1] if self._prompt is None else self._prompt
        logits = self._model.run(
            Texts(grown, self._real),
            reads=reads,
            writes=writes_of(edits),
            logits_at=torch.tensor([grown.shape[1] - 1]),
            prompt=self._prompt,
        )
        assert logits is not None  # noqa: S101  # they were asked for
        return logits[:, -1]


def _extended(
    real: Bool[Tensor, "batch pos"], length: int, tokens: Int[Tensor, "batch new"]
) -> Bool[Tensor, "batch longer"]:
    """Padding mask extended by new tokens, all real after the prompt."""
    missing = length + tokens.shape[1] - real.shape[1]
    more = torch.ones(len(real), max(missing, 0), dtype=torch.bool, device=real.device)
    return torch.cat([real, more], 1)
