"""Memory and work at large vocabularies, counted and never timed."""

import gc
import json
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import headscope as hs
from headscope.circuits import Dictionary
from headscope.cli.app import app
from headscope.comparing import losses_of_tokens
from headscope.errors import HeadscopeError
from headscope.models.protocol import HeadModel
from headscope.planning import SHAPES, Sizes, sizes_of
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
        found = losses_of_tokens(model, probe)
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


class Alive(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are alive, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, given: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        found = function(*given, **(named or {}))
        before = {
            one.untyped_storage()._cdata
            for one in tree_leaves((given, named))
            if isinstance(one, Tensor)
        }
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self._count(one.untyped_storage(), before)
        return found

    def _count(self, storage: Any, before: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known | before:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._known.discard(key)


def of_sizes(sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    if sizes.mlp_matrices == 2:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=sizes.d_vocab,
                n_embd=sizes.d_model,
                n_layer=sizes.layers,
                n_head=sizes.heads,
                n_positions=128,
                bos_token_id=1,
                eos_token_id=None,
            )
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.d_vocab,
            hidden_size=sizes.d_model,
            intermediate_size=sizes.d_mlp,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            tie_word_embeddings=sizes.tied,
            eos_token_id=None,
        )
    ).eval()


PLANNED = (
    Sizes(3, 8, 8, 64, 8, 256, 500, 2, tied=True),
    Sizes(4, 8, 2, 128, 16, 320, 2000),
    Sizes(2, 4, 4, 64, 16, 128, 8000, tied=True),
)
_ON_CPU = {"length": 96, "device": "cpu-core", "dtype": "float32", "steps": 8}


@pytest.mark.parametrize("sizes", PLANNED, ids=["gpt2", "llama", "words"])
def test_l5_a_plan_is_within_a_quarter_of_what_is_counted(
    sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations by torch's counter, memory by the tensors that are alive."""
    monkeypatch.setattr("headscope.ablation.engine.keep_freed_memory", lambda: None)
    model = hs.load(of_sizes(sizes))
    weights = sum(one.numel() * 4 for one in model.module.parameters())
    probe = hs.probes.from_tokens(torch.arange(6 * 96).reshape(6, 96) % 397)
    last = torch.zeros_like(probe.real)
    last[:, -1] = True
    asked = replace(probe, targets=torch.where(last, 3, -1), foils=torch.where(last, 5, -1))
    names = ["previous_token", "entropy"]
    difference = hs.metrics.logit_difference
    works: dict[Any, tuple[int, Callable[[], object]]] = {
        "scan": (6, lambda: hs.score(model, probe, names)),
        "ablation": (6, lambda: hs.ablate_heads(model, asked, difference, "zero")),
        "lens": (1, lambda: hs.lens.logit_lens(model, probe.tokens[0].tolist())),
    }
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula = {flash: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    for study, (examples, work) in works.items():
        work()  # what is measured once a model is measured
        gc.collect()
        with FlopCounterMode(display=False, custom_mapping=formula) as flops, Alive() as alive:
            work()
        cost = hs.plan(sizes, study, examples=examples, **_ON_CPU)
        assert cost.flops == pytest.approx(flops.get_total_flops(), rel=0.25), study
        assert cost.memory == pytest.approx(weights + alive.most, rel=0.25), study


def test_l5_this_machine_is_measured() -> None:
    """Hours follow the rate of a product here, and double with the work."""
    once, twice = (hs.plan("gpt2", examples=n, device="here", dtype="float32") for n in (50, 100))
    assert once.flops * 2 == twice.flops
    assert 0.3 < twice.hours / once.hours / 2 < 3  # each is measured by itself, on a busy machine
    rows, weights = torch.ones(1024, 768), torch.ones(768, 3072)
    taken = []
    for _ in range(8):
        started = time.perf_counter()
        rows @ weights
        taken.append(time.perf_counter() - started)
    rate = 0.8 * 2 * rows.numel() * 3072 / min(taken)
    assert 0.2 < once.flops / (3600 * once.hours) / rate < 5
    assert once.fits


def test_l5_decoding_is_planned_by_what_each_step_reads() -> None:
    once, twice = (hs.plan("llama-3-8b", "decode", examples=1, steps=n) for n in (100, 200))
    read = 100 * once.memory / 3.35e12 / 0.5 / 3600
    assert twice.hours - once.hours == pytest.approx(read, rel=0.25)


def test_l5_sizes_of_a_config_are_those_of_its_weights(tmp_path: Path) -> None:
    for sizes in PLANNED[:2]:
        of_sizes(sizes).config.save_pretrained(tmp_path)
        assert sizes_of(str(tmp_path)) == sizes
    assert SHAPES["llama-3-8b"].parameters == pytest.approx(8.03e9, rel=0.01)
    assert SHAPES["gpt2"].parameters == pytest.approx(124e6, rel=0.02)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["layers=2,heads=4"], "leaves out d_model"),
        (["layers=2,width=4"], "width"),
        (["layers=two"], "whole number"),
        (["gpt2", "--study", "scam"], "scan"),
        (["gpt2", "--device", "h1000"], "h100"),
        (["no-such-folder"], "known shape"),
    ],
)
def test_l5_what_cannot_be_planned_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        CliRunner().invoke(app, ["plan", *given], catch_exceptions=False)


def test_l5_a_plan_is_printed_as_rows() -> None:
    run = CliRunner().invoke(app, ["plan", "llama-3-70b", "--json"], catch_exceptions=False)
    (row,) = json.loads(run.stdout)
    assert row["fits"] is False
    assert row["memory"] > 140e9


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux for its maps")
def test_l4_workers_share_the_pages_of_a_models_file(tmp_path: Path) -> None:
    """Weights in the type of their file are mapped, so that they exist once on a machine."""
    of_sizes(PLANNED[1]).save_pretrained(tmp_path)
    model = hs.load(str(tmp_path))
    hs.score(model, hs.probes.from_tokens(torch.arange(12)[None]), ["entropy"])
    mapped = [
        range(*(int(edge, 16) for edge in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    weights = list(model.module.parameters())
    assert all(any(one.data_ptr() in part for part in mapped) for one in weights)
