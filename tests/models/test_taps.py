"""Taps read what the model computes and write what it goes on with, in every family."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope import edits
from headscope.edits import Span
from headscope.errors import HeadscopeError, InputError
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.models.taps import Tap, TapView
from tests.models import families
from tests.models.checks import same_state, state

FAMILIES = [*families.HF_FAMILIES, *families.BRIDGE_FAMILIES]
SOME = ["gpt2", "llama", "gemma2", "gpt_neox", "bloom"]


@cache
def model_of(family: str) -> HeadModel:
    return load(families.build(family))


def keep(model: HeadModel, taps: list[Tap], **options: Any) -> dict[Tap, Tensor]:
    """What some taps hold in one pass."""
    found: dict[Tap, Tensor] = {}

    def read(view: TapView) -> None:
        found[view.tap] = view.value.detach().clone()

    model.run(families.tokens(), reads=dict.fromkeys(taps, read), **options)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_add_up_and_follow_each_other(family: str) -> None:
    model = model_of(family)
    before = state(model.module)
    layers = model.shape.attention_layers
    sites = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    found = keep(model, [Tap("embed"), *(Tap(s, n) for n in layers for s in sites)])
    assert same_state(before, state(model.module))
    assert torch.equal(found[Tap("embed")], found[Tap("resid_pre", 0)])
    for layer in layers:
        pre, attention, mlp, post = (found[Tap(site, layer)] for site in sites)
        torch.testing.assert_close(pre + attention + mlp, post, atol=2e-4, rtol=1e-4)
        if layer + 1 in layers:
            assert torch.equal(post, found[Tap("resid_pre", layer + 1)])


@pytest.mark.parametrize("family", SOME)
def test_residual_taps_are_the_models_own_hidden_states(family: str) -> None:
    model = model_of(family)
    with torch.no_grad():
        own = model.module(families.tokens(), output_hidden_states=True).hidden_states
    layers = range(model.shape.n_layers)
    found = keep(model, [Tap("resid_pre", layer) for layer in layers])
    for layer in layers:
        largest = float(own[layer].abs().max())  # the two attend by other kernels
        torch.testing.assert_close(
            found[Tap("resid_pre", layer)], own[layer], atol=1e-5 * largest, rtol=0
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "resid_post", "z", "value"])
def test_writing_what_was_read_changes_nothing(family: str, site: str) -> None:
    model, tap = model_of(family), (site, model_of(family).shape.attention_layers[-1])
    plain = model.run(families.tokens())
    same = model.run(families.tokens(), writes={tap: lambda value, span: value.clone()})
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    # Not a multiple or a shift, which the next norm would take back.
    other = model.run(families.tokens(), writes={tap: lambda value, span: value.roll(1, -1)})
    assert float((other - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("family", SOME)
def test_a_written_z_is_an_edit_of_z(family: str) -> None:
    model = model_of(family)

    def off(value: Tensor, span: Span) -> Tensor:
        value = value.clone()
        value[:, :, 1] = 0
        return value

    written = model.run(families.tokens(), writes={("z", 1): off})
    edited = model.forward(families.tokens(), edits=[edits.zero("L1H1")])
    assert torch.equal(written, edited)


@pytest.mark.parametrize("family", SOME)
def test_silencing_both_writes_passes_the_stream_through(family: str) -> None:
    model = model_of(family)
    found: dict[Tap, Tensor] = {}
    silent = {(site, 1): lambda value, span: torch.zeros_like(value)
              for site in ("attn_out", "mlp_out")}  # fmt: skip
    reads = {Tap(site, 1): lambda view: found.update({view.tap: view.value.clone()})
             for site in ("resid_pre", "resid_post")}  # fmt: skip
    model.run(families.tokens(), reads=reads, writes=silent)
    torch.testing.assert_close(found[Tap("resid_pre", 1)], found[Tap("resid_post", 1)])


def test_a_reader_sees_what_was_written() -> None:
    model = model_of("llama")
    found = []
    for tap in (Tap("resid_pre", 1), Tap("z", 1), Tap("value", 1), Tap("logits")):
        model.run(
            families.tokens(),
            reads={tap: lambda view: found.append(float(view.value.abs().max()))},
            writes={tap: lambda value, span: torch.zeros_like(value)},
        )
    assert found == [0.0] * 4


@pytest.mark.parametrize("family", SOME)
def test_rows_are_read_on_demand(family: str) -> None:
    model = model_of(family)
    sums = []

    def read(view: TapView) -> None:
        rows = view.rows(torch.tensor([3, 7]))
        sums.append(rows.pattern.sum(-1))
        assert view.value.shape[2] == families.tokens().shape[1]
        torch.testing.assert_close(view.value[:, :, [3, 7], : rows.pattern.shape[-1]], rows.pattern)

    model.run(families.tokens(), reads={("pattern", 0): read}, until=("pattern", 0))
    torch.testing.assert_close(sums[0], torch.ones_like(sums[0]))


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
@pytest.mark.parametrize("logits_at", [None, torch.empty(0, dtype=torch.long)])
def test_without_logits_the_last_block_is_still_seen(family: str, logits_at: Tensor | None) -> None:
    model, seen = model_of(family), []
    last = ("resid_post", model.shape.n_layers - 1)
    until = last if logits_at is None else None
    model.run(families.tokens(), reads={last: seen.append}, until=until, logits_at=logits_at)
    assert len(seen) == 1


@pytest.mark.parametrize("site", ["resid_post", "z", "attn_out", "final_resid"])
def test_until_stops_the_pass_after_its_tap(site: str) -> None:
    model = model_of("gpt2")
    seen: list[str] = []
    tap = Tap(site) if site == "final_resid" else Tap(site, 0)
    reads = {
        tap: lambda view: seen.append(site),
        Tap("resid_pre", 1): lambda view: seen.append("1"),
    }
    logits = model.run(families.tokens(), reads=reads, until=tap)
    assert logits is None
    assert seen == (["1", site] if site == "final_resid" else [site])
    assert model.run(families.tokens(), logits_at=torch.empty(0, dtype=torch.long)) is None


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "value"])
def test_gradients_are_finite_differences(family: str, site: str) -> None:
    model, tap = load(families.fresh(family).double()), Tap(site, 1)
    tokens = families.tokens()[:1]
    kept: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 5] - logits[0, -1, 7]

    logits = model.run(tokens, reads={tap: lambda view: kept.append(view.value)}, grad=True)
    (gradient,) = torch.autograd.grad(metric(logits), kept)
    step = torch.randn(kept[0].shape, generator=torch.Generator().manual_seed(0)).double()
    ends = [
        metric(model.run(tokens, writes={tap: lambda value, span, e=e: value + e * step}))
        for e in (1e-3, -1e-3)
    ]
    numeric = float(ends[0] - ends[1]) / 2e-3  # a wide step: norms compute in fp32 all the same
    assert float((gradient * step).sum()) == pytest.approx(
        numeric, abs=3e-3 * float(gradient.norm())
    )


def test_no_gradient_unless_asked() -> None:
    model = model_of("gpt2")
    assert not model.run(families.tokens()).requires_grad


def test_stacks_say_what_the_shape_says() -> None:
    (stack,) = model_of("gemma2").stacks.values()
    shape = model_of("gemma2").shape
    assert (stack.name, stack.letter, stack.mask.kind) == ("", "L", "causal")
    assert (stack.n_heads, stack.n_kv_heads, stack.windows) == (
        shape.n_heads, shape.n_kv_heads, shape.windows,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (("resid_mid", 0), "unknown site 'resid_mid'; did you mean"),
        (("z", 9), "needs a layer of .*, 0 to 2; got 9"),
        (("z",), "needs a layer"),
        (("embed", 1), "is not in a layer"),
        (("z", 0, "cross"), "single attention stack"),
    ],
)
def test_taps_that_a_model_lacks_are_refused_before_it_runs(tap: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_of("gpt2").run(families.tokens(), reads={tap: print})


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
@pytest.mark.parametrize("site", ["resid_post", "z", "value", "query", "pattern", "mlp_out"])
def test_writes_are_held_to_a_tensor_of_the_same_shape(family: str, site: str) -> None:
    model, tap = model_of(family), Tap(site, 1)
    before = state(model.module)

    def run(made: Any) -> Tensor | None:
        return model.run(families.tokens(), writes={tap: lambda value, span: made(value)})

    for made, told in (
        (lambda value: value[..., :3], f"the write of {site} of layer 1 returned .* for .*shape"),
        (lambda value: None, "returned NoneType: return the replacement tensor"),
        (lambda value: value.numpy(), "returned ndarray"),
    ):
        with pytest.raises(InputError, match=told):
            run(made)
    assert same_state(before, state(model.module))
    plain = run(lambda value: value.clone())
    torch.testing.assert_close(run(lambda value: value.double()), plain)
    strided = run(lambda value: value.mean(0, keepdim=True).expand_as(value))
    whole = run(lambda value: value.mean(0, keepdim=True).expand_as(value).contiguous())
    torch.testing.assert_close(strided, whole)


def test_a_failing_reader_leaves_the_model_as_it_was() -> None:
    model = model_of("llama")
    before = state(model.module)

    def fails(view: TapView) -> None:
        raise HeadscopeError("stop")

    for tap in (("resid_pre", 1), ("z", 1), ("mlp_out", 1)):
        with pytest.raises(HeadscopeError, match="stop"):
            model.run(families.tokens(), reads={tap: fails})
        assert same_state(before, state(model.module))


@pytest.mark.parametrize("site", ["query", "key"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_rows_that_a_reader_sees_are_those_of_written_queries_and_keys(
    family: str, site: str
) -> None:
    model, tokens = model_of(family), families.tokens()
    clean = keep(model, [Tap("pattern", 1)])[Tap("pattern", 1)]
    seen: dict[str, Tensor] = {}

    def read(view: TapView) -> None:
        seen[view.tap.site] = view.rows(torch.arange(tokens.shape[1])).pattern.clone()

    def zeroed(value: Tensor, _span: Span) -> Tensor:
        value = value.clone()
        value[:, 0] = 0  # head first: all scores of this head are 0
        return value

    taps: Any = {Tap("pattern", 1): read, Tap("z", 1): read}
    model.run(tokens, reads=taps, writes={Tap(site, 1): zeroed})
    heads = range(1 if site == "query" else model.shape.group_size)
    visible = clean[:, 0] > 0
    flat = visible / visible.sum(-1, keepdim=True)
    for rows in seen.values():
        for head in heads:
            torch.testing.assert_close(rows[:, head], flat.to(rows), atol=1e-6, rtol=0)
            assert (clean[:, head] - flat).abs().max() > 0.05
        rest = slice(len(heads), None)
        torch.testing.assert_close(rows[:, rest], clean[:, rest], atol=1e-6, rtol=1e-5)
    assert set(seen) == {"pattern", "z"}
