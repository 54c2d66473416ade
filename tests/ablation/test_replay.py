"""Suffix replay gives what whole passes give: every family, padding, site, window and stack."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from headscope import edits, probes
from headscope.ablation.engine import ForwardSource, engine_for
from headscope.edits import Variant
from headscope.models.hf.model import HFModel
from headscope.models.hf.replay import Replay, record
from headscope.models.loading import load
from headscope.models.taps import Tap, Texts
from tests.ablation.helpers import model_of, probe_of
from tests.models import encoders, families, seq2seq, vision


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


def without_a_replay(name: str) -> tuple[Any, Texts, list[torch.nn.Module]]:
    """A model that replay does not know, a batch, and blocks that a late edit leaves alone."""
    if name == "encoder":
        model: Any = load(encoders.encoder("bert"))
        tokens = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(1))
        return model, Texts(tokens, torch.ones_like(tokens, dtype=torch.bool)), []
    if name == "images":
        model = load(vision.vision("vit"))
        probe = probes.from_batch({"pixel_values": vision.pictures()})
        return model, Texts(probe.tokens, probe.real, probe.inputs), []
    whole: Any = load(seq2seq.module_of("t5"))
    model = whole.stack(name)
    inputs = {
        **seq2seq.source_of("t5"),
        "decoder_input_ids": torch.randint(5, 95, (2, 6), generator=torch.Generator()),
    }
    probe = probes.from_batch(inputs)
    before = list(whole.stack("encoder").layout.blocks)
    return model, Texts(probe.tokens, probe.real, probe.inputs), before


@pytest.mark.parametrize("name", ["encoder", "images", "decoder", "cross"])
def test_models_that_are_not_replayed_begin_at_the_first_edited_block(name: str) -> None:
    model, texts, before = without_a_replay(name)
    assert texts.real is not None
    engine = engine_for(model, texts.tokens, texts.real, texts.inputs)
    assert engine.resumes
    assert not engine.replays
    assert engine.name == "passes from the first edited layer"
    where = torch.zeros(1, dtype=torch.long)
    read = torch.zeros_like(texts.real)
    read[:, 0] = True
    source = engine.source(model, texts.tokens, texts.real, read, texts.inputs)
    whole = ForwardSource(model, texts.tokens, texts.real, read, inputs=texts.inputs)
    last = model.shape.n_layers - 1
    idle = [*before, *model.layout.blocks[:last]]
    assert len(idle) >= last
    variants = [(edits.zero((last, 0)),), (edits.zero([(last, 1), (last, 2)]),)]
    expected = whole.rows(variants)
    ran: list[Any] = []
    hooks = [
        part.register_forward_hook(lambda module, *_: ran.append(module))
        for block in idle
        for part in block.modules()
        if part is not block
    ]
    torch.testing.assert_close(source.rows(variants), expected, atol=1e-5, rtol=1e-5)
    assert not ran
    early: list[Variant] = [(edits.zero((0, 0)),), (edits.zero((last, 0)),)]
    torch.testing.assert_close(source.rows(early), whole.rows(early), atol=1e-5, rtol=1e-5)
    assert ran
    for hook in hooks:
        hook.remove()
    values = source.values_at(variants, [Tap("z", 0)])
    model.run(texts, reads={Tap("z", 0): lambda view: ran.append(view.value)}, logits_at=where)
    torch.testing.assert_close(values[Tap("z", 0)][1], ran[-1])


@pytest.mark.parametrize("name", ["encoder", "images", "decoder", "cross"])
def test_resumed_passes_run_no_more_of_a_block_than_an_edit_can_change(name: str) -> None:
    """Attention whose outputs are known does not run, nor do rows of the last block unread."""
    model, texts, _ = without_a_replay(name)
    assert texts.real is not None
    engine = engine_for(model, texts.tokens, texts.real, texts.inputs)
    assert engine.lean == ("first" if name == "images" else "read")
    read = torch.zeros_like(texts.real)
    read[:, -1 if name == "encoder" else 0] = True
    source = engine.source(model, texts.tokens, texts.real, read, texts.inputs)
    whole = ForwardSource(model, texts.tokens, texts.real, read, inputs=texts.inputs)
    first, last, length = 0, model.shape.n_layers - 1, model.n_queries(texts)
    some = torch.arange(length).expand(len(texts.tokens), -1) < 3
    projections = {parts.projection for parts in model.layout.layers.values()}
    wide = dict[torch.nn.Module, int]()

    def note(module: torch.nn.Module, _given: Any, output: torch.Tensor) -> None:
        wide[module] = output.shape[1]

    linear = [
        (layer, part)
        for layer in (first, last)
        for part in model.layout.blocks[layer].modules()
        if isinstance(part, torch.nn.Linear)
    ]
    hooks = [part.register_forward_hook(note) for _, part in linear]
    cases: list[tuple[int, list[Variant]]] = [
        (first, [(edits.zero((first, 0)),), (edits.zero([(first, 1), (first, 2)]),)]),
        (last, [(edits.zero((last, 0)),), (edits.zero((last, 1)),)]),
        (first, [(edits.zero([(first, 0), (last, 1)]),), (edits.zero((first, 3)),)]),
        (first, [(edits.uniform((first, 0)),), (edits.zero((first, 3)),)]),
        (last, [(edits.uniform((last, 0)), edits.zero((last, 2)))]),
        (last, [(edits.scale((last, 0), 0.5, positions=some),), ()]),
    ]
    for layer, variants in cases:
        expected = whole.rows(variants)
        wide.clear()
        torch.testing.assert_close(source.rows(variants), expected, atol=1e-5, rtol=1e-5)
        edited = [edit for variant in variants for edit in variant]
        inside = set(model.layout.layers[layer].attention.modules()) - projections
        known = all(edit.site == "z" for edit in edited if layer in edit.layers)
        assert known == (not inside & wide.keys())
        free = not any(last in edit.layers for edit in edited) or (known and layer == last)
        mixing = {*model.layout.layers[last].attention.modules(), *projections}
        narrow = [wide[part] for at, part in linear if at == last and part not in mixing]
        if isinstance(model, HFModel):
            assert set(narrow) == {1 if free else length}
    for hook in hooks:
        hook.remove()
