"""Memory and work at large vocabularies, counted and never timed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.circuits import Dictionary
from headscope.comparing import token_losses
from headscope.models.protocol import HeadModel
from headscope.probes.encoding import next_tokens
from tests.circuits.conftest import random_model

_ENTRIES = 1 << 14  # of one block, instead of millions


def model_of(words: int, **sizes: Any) -> HeadModel:
    torch.manual_seed(0)
    wanted = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    } | sizes
    return hs.load(LlamaForCausalLM(LlamaConfig(vocab_size=words, **wanted)).eval())


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that operations made, weights and views of them aside."""

    def __init__(self, model: HeadModel) -> None:
        super().__init__()
        self.most = 0
        self._weights = {one.untyped_storage().data_ptr() for one in model.module.parameters()}

    def __torch_dispatch__(
        self, function: Any, types: Any, given: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        found = function(*given, **(named or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self._weights:
                self.most = max(self.most, one.numel())
        return found


def texts(model: HeadModel) -> hs.Probe:
    return hs.probes.from_tokens(torch.arange(4 * 96).reshape(4, 96) % 97)


WORKS: dict[str, Callable[[HeadModel], object]] = {
    "scores": lambda model: hs.circuits.score(model, tokens=24),
    "card": lambda model: hs.circuits.head_card(model, "L1H2"),
    "words": lambda model: hs.circuits.vocabulary_view(hs.circuits.ov(model), Dictionary(model)),
    "logit lens": lambda model: hs.lens.logit_lens(model, list(range(96))),
    "head lens": lambda model: hs.lens.head_lens(model, list(range(9))),
    "tuned lens": lambda model: hs.lens.tuned_lens(model, texts(model), steps=2, tokens=8),
    "losses": lambda model: hs.retrieval.token_losses(model, texts(model)),
}


@pytest.mark.parametrize("name", WORKS)
def test_l1_no_tensor_grows_with_the_vocabulary(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At five times the words as much memory, but for a few numbers a word."""
    for place in (
        "circuits.measures._BLOCK_ENTRIES",
        "circuits.vocabulary._BLOCK_ENTRIES",
        "lens.linear._BLOCK_ENTRIES",
        "lens.reading._ENTRIES",
        "views._ENTRIES",
    ):
        monkeypatch.setattr(f"headscope.{place}", _ENTRIES)
    monkeypatch.setattr("headscope.circuits.vocabulary._KEPT_ENTRIES", 0)
    most = {}
    for words in (1000, 5000):
        model = model_of(words)
        model.digest()
        with Largest(model) as seen:
            WORKS[name](model)
        most[words] = seen.most
    assert most[5000] <= max(most[1000], 2 * _ENTRIES), most


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_l1_losses_are_those_of_the_models_own_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(family)
    tokens = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, :4] = False
    probe = hs.probes.from_tokens(tokens, real)
    logits = model.forward(tokens, real=real).log_softmax(-1)
    targets = next_tokens(tokens, real)
    expected = -logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    expected = expected.where(targets >= 0, torch.nan)
    for entries in (1 << 24, 200):  # whole, and in blocks of rows and of words
        monkeypatch.setattr("headscope.views._ENTRIES", entries)
        found = token_losses(model, probe)
        np.testing.assert_allclose(found[:, 1:], expected[:, :-1].detach(), atol=2e-6)


def test_l1_a_rank_that_nobody_asks_for_keeps_no_pair_waiting() -> None:
    """Where targets come last by score, they are decided for copying within a few words."""
    model, tokens = model_of(60), torch.arange(12)
    words, seen = Dictionary(model), dict[bool, int]()
    factors = hs.circuits.ov(model)
    for both in (True, False):
        looked: list[int] = []

        def outputs(ids: Tensor, looked: list[int] = looked) -> Tensor:
            looked.append(len(ids))
            return words.outputs(ids.remainder(60))

        ranks = hs.circuits.target_ranks(
            factors, lambda layer: words.inputs(tokens, layer), outputs, tokens, 60 << 12,
            limit=40, suppressed=both,
        )  # fmt: skip
        seen[both] = sum(looked)
        whole = hs.circuits.target_ranks(
            factors, lambda layer: words.inputs(tokens, layer), outputs, tokens, 60 << 12, limit=40
        )
        assert torch.equal(ranks.promoted, whole.promoted)
    assert seen[False] <= seen[True]
