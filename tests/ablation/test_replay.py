"""Suffix replay gives what whole passes give: every family, padding, site, window and stack."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from headscope import edits
from headscope.ablation.engine import ForwardSource, engine_for
from headscope.edits import Variant
from headscope.models.hf.model import HFModel
from headscope.models.hf.replay import Replay, record
from headscope.models.loading import load
from tests.ablation.helpers import model_of, probe_of
from tests.models import families


def variants_of(
    model: HFModel, layer: int, late: torch.Tensor, real: torch.Tensor
) -> list[Variant]:
    """One variant of every kind that starts in a layer."""
    shape, generator = model.shape, torch.Generator().manual_seed(3)
    layers = shape.attention_layers

    def drawn(*sizes: int) -> dict[int, torch.Tensor]:
        return {i: torch.randn(len(real), *sizes, generator=generator) for i in layers}

    z = drawn(12, 4, shape.d_head)
    kv = drawn(shape.n_kv_heads, 12, shape.d_head)
    above = [(i, h) for i in layers if i > layer for h in range(4)]
    return [
        (edits.zero((layer, 0)),),
        (edits.zero((layer, 3), positions=late),),
        (edits.patch((layer, 1), z, positions=late),),
        (edits.uniform((layer, 2), positions=late),),
        (edits.patch((layer, 0), kv, site="key", positions=late),),
        (edits.patch((layer, 0), kv, site="value"),),
        (edits.attend_to_first((layer, 1), real),),
        (edits.zero([(layer, 1), (2, 1)]), edits.scale([(2, 0)], 0.5), edits.uniform((1, 0))),
        (edits.zero((layer, 2)), *((edits.patch(above, z),) if above else ())),
    ]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", families.HF_FAMILIES)
def test_equals_whole_passes(family: str, padding: str) -> None:
    model, probe = model_of(family), probe_of(padding)
    assert isinstance(model, HFModel)
    recording = record(model, probe.tokens, None if padding == "none" else probe.real)
    for read in (probe.mark("end"), probe.real):
        whole = ForwardSource(model, probe.tokens, probe.real, read)
        for layer, fast in ((0, True), (1, True), (2, True), (1, False)):
            replay = Replay(model, recording, read, prefix=fast, lean=fast)
            variants = variants_of(model, layer, probe.mark("late"), probe.real)
            found = replay.logits(replay.run(variants))
            expected = whole.rows(variants)
            assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
            late = [v for v in variants if len(v) == 1 and replay.start(v)[1] > 0]
            assert not fast or late or read is probe.real
            if late:
                again = replay.logits(replay.run(late))
                assert (again - whole.rows(late)).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("family", families.HF_FAMILIES)
def test_every_family_of_the_fast_path_is_replayed(family: str) -> None:
    probe = probe_of()
    engine = engine_for(model_of(family), probe.tokens, probe.real)
    assert engine.replays
    assert engine.prefix
    assert engine.noop_error < 1e-5


def test_the_bridge_path_runs_whole_passes() -> None:
    probe = probe_of()
    engine = engine_for(model_of("bloom"), probe.tokens, probe.real)
    assert not engine.replays


def test_blocks_that_do_not_run_alone_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = HFModel.wrap(families.fresh("llama")), probe_of()
    assert model is not None
    expected = model.forward(probe.tokens)

    class Stateful(type(model.layout.blocks[1])):
        """A block that also needs what the block below left behind."""

        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            first = model.layout.blocks[0]
            if first.left is None:
                raise RuntimeError("the block below has not run")
            out = super().forward(hidden + 0 * first.left.mean(), *args, **kwargs)
            first.left = None
            return out

    def leave(module: Any, _args: Any, output: Any) -> None:
        module.left = output[0] if isinstance(output, tuple) else output

    model.layout.blocks[0].register_forward_hook(leave)
    model.layout.blocks[1].__class__ = Stateful
    assert torch.equal(model.forward(probe.tokens), expected)
    engine = engine_for(model, probe.tokens, probe.real)
    assert not engine.replays
    source = engine.source(model, probe.tokens, probe.real, probe.mark("end"))
    variant = (edits.zero("L1H1"),)
    rows = source.logits(source.rows([variant, variant]))
    last = model.forward(probe.tokens, edits=variant)[probe.mark("end")]
    assert torch.allclose(rows, last.repeat(2, 1), atol=1e-5)


@dataclass(frozen=True)
class _Broken:
    site: Literal["z"] = "z"
    layers: frozenset[int] = frozenset({1})

    def __call__(self, layer: int, value: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


def test_replay_leaves_the_model_as_it_was_even_when_it_fails() -> None:
    model, probe = model_of("gpt2"), probe_of()
    assert isinstance(model, HFModel)
    before = {name: dict(m.__dict__) for name, m in model.module.named_modules()}
    config = model.module.config._attn_implementation
    replay = Replay(model, record(model, probe.tokens, None), probe.mark("end"))

    with pytest.raises(ZeroDivisionError):
        replay.run([(edits.zero("L0H0"), _Broken())])
    after = {name: dict(m.__dict__) for name, m in model.module.named_modules()}
    for name in before:
        assert before[name].keys() == after[name].keys()
        assert not after[name]["_forward_pre_hooks"]
        assert not after[name]["_forward_hooks"]
    assert model.module.config._attn_implementation == config


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kind", ["none", "right"])
def test_prefixes_are_reused_with_and_without_padding(family: str, kind: str) -> None:
    """A mask that is cut like a value of each position would silently cost all of the reuse."""
    model = load(families.build(family))
    real = families.padding(kind)
    engine = engine_for(model, families.tokens(), torch.ones_like(families.tokens()).bool()
                    if real is None else real)  # fmt: skip
    assert engine.replays
    assert engine.prefix
