import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.base.stacks import MaskKind, MaskRule
from headscope.models import attention
from headscope.models.attention import AttentionCall, fused

HEADS, D_HEAD, D_VALUE, BATCH, KEYS = 4, 6, 5, 2, 9


def a_call(
    *,
    kv_heads: int = HEADS,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: bool = False,
    padding: str = "none",
    queries: int = KEYS,
    keys: int = KEYS,
    seed: int = 0,
    kind: MaskKind = "causal",
    dtype: torch.dtype = torch.float32,
) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, generator=generator)).to(dtype)

    real = torch.ones(BATCH, keys, dtype=torch.bool)
    if padding == "left":
        real[0, : keys // 3] = False
    if padding == "right":
        real[0, keys - keys // 3 :] = False
    return AttentionCall(
        layer=0,
        query=normal(BATCH, HEADS, queries, D_HEAD),
        key=normal(BATCH, kv_heads, keys, D_HEAD),
        value=normal(BATCH, kv_heads, keys, D_VALUE),
        scaling=0.4,
        real=None if padding == "none" else real,
        mask=MaskRule(kind, window),
        soft_cap=soft_cap,
        sinks=normal(HEADS) if sinks else None,
    )


def sees(call: AttentionCall, example: int, position: int, key: int) -> bool:
    if call.real is not None and not call.real[example, position]:
        return key == position
    window = call.mask.window
    inside = window is None or abs(key - position) < window
    reached = key <= position or not call.mask.causal
    return reached and inside and (call.real is None or bool(call.real[example, key]))


def slow_row(call: AttentionCall, example: int, head: int, position: int) -> list[float]:
    """One row, number by number, as a textbook has it."""
    kv_head = head // (call.query.shape[1] // call.key.shape[1])
    query = call.query[example, head, position - call.first_query].double()
    scores = {}
    for key in range(call.n_keys):
        if sees(call, example, position, key):
            score = float(query @ call.key[example, kv_head, key].double()) * call.scaling
            if call.soft_cap is not None:
                score = call.soft_cap * math.tanh(score / call.soft_cap)
            scores[key] = score
    total = sum(math.exp(score) for score in scores.values())
    if call.sinks is not None:
        total += math.exp(float(call.sinks[head]))
    return [math.exp(scores[k]) / total if k in scores else 0.0 for k in range(call.n_keys)]


def slow_pattern(call: AttentionCall) -> Tensor:
    rows = [
        [
            [slow_row(call, example, head, p) for p in range(call.first_query, call.n_keys)]
            for head in range(HEADS)
        ]
        for example in range(BATCH)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def slow_z(call: AttentionCall) -> Tensor:
    values = call.value.double().repeat_interleave(HEADS // call.key.shape[1], 1)
    return (slow_pattern(call) @ values).transpose(1, 2)


def assert_textbook(call: AttentionCall) -> None:
    expected = slow_pattern(call)
    positions = torch.arange(call.first_query, call.n_keys)
    for size in (1, 7, len(positions)):
        for block in positions.split(size):
            rows = call.rows(block)
            width = int(block.max()) + 1 if call.mask.causal else rows.pattern.shape[-1]
            assert rows.pattern.shape == (BATCH, HEADS, len(block), width)
            part = expected[:, :, block - call.first_query]
            torch.testing.assert_close(rows.pattern.double(), part[..., :width], atol=2e-6, rtol=0)
            assert not part[..., width:].any()
            assert torch.equal(rows.visible, (part > 0).any(1)[..., :width])
    whole = call.rows(positions).pattern
    torch.testing.assert_close(call.average(whole).double(), slow_z(call), atol=1e-5, rtol=0)
    torch.testing.assert_close(fused(call).double(), slow_z(call), atol=1e-5, rtol=0)


@pytest.mark.parametrize("queries", [KEYS, 4, 1])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("kv_heads", "kind"), [(4, "causal"), (2, "causal"), (1, "bidirectional")])
def test_every_combination_is_the_textbook_softmax(
    kv_heads: int, kind: MaskKind, padding: str, queries: int
) -> None:
    for window, soft_cap, sinks in product((None, 1, 3), (None, 1.5), (False, True)):
        assert_textbook(
            a_call(
                kv_heads=kv_heads,
                window=window,
                soft_cap=soft_cap,
                sinks=sinks,
                padding=padding,
                queries=queries,
                kind=kind,
            )
        )


@pytest.mark.parametrize("entries", [1, 40, 200])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_fused_output_does_not_depend_on_its_blocks(
    monkeypatch: pytest.MonkeyPatch, padding: str, entries: int
) -> None:
    monkeypatch.setattr(attention, "_BLOCK_ENTRIES", entries)
    kinds: tuple[MaskKind, ...] = ("causal", "bidirectional")
    for kind, window, soft_cap, sinks in product(kinds, (None, 3), (None, 1.5), (False, True)):
        call = a_call(
            kv_heads=2,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            padding=padding,
            queries=7,
            kind=kind,
        )
        torch.testing.assert_close(fused(call).double(), slow_z(call), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 12),
    soft_cap=st.none() | st.floats(0.5, 50),
    sinks=st.booleans(),
    padding=st.sampled_from(["none", "left", "right"]),
    keys=st.integers(1, 12),
    share=st.floats(0, 1),
    seed=st.integers(0, 1 << 16),
    kind=st.sampled_from(["causal", "bidirectional"]),
)
def test_any_call_is_the_textbook_softmax(
    kv_heads: int,
    window: int | None,
    soft_cap: float | None,
    sinks: bool,
    padding: str,
    keys: int,
    share: float,
    seed: int,
    kind: MaskKind,
) -> None:
    assert_textbook(
        a_call(
            kv_heads=kv_heads,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            padding=padding,
            keys=keys,
            queries=max(1, round(share * keys)),
            seed=seed,
            kind=kind,
        )
    )


def test_rows_of_half_precision_are_exact() -> None:
    call = a_call(kv_heads=2, dtype=torch.bfloat16)
    rows = call.rows(torch.arange(KEYS))
    assert rows.pattern.dtype == torch.float32
    torch.testing.assert_close(rows.pattern.double(), slow_pattern(call), atol=2e-6, rtol=0)


def test_rows_in_any_order_of_queries() -> None:
    call = a_call(kv_heads=2, window=4)
    positions = torch.tensor([7, 0, 3, 3])
    expected = slow_pattern(call)[:, :, positions, :8]
    torch.testing.assert_close(call.rows(positions).pattern.double(), expected, atol=2e-6, rtol=0)


def test_large_scores_do_not_overflow() -> None:
    call = a_call()
    loud = AttentionCall(0, call.query * 1e3, call.key * 1e3, call.value, 1.0, sinks=torch.ones(4))
    pattern = loud.rows(torch.arange(KEYS)).pattern
    assert bool(torch.isfinite(pattern).all())
    assert bool((pattern.sum(-1) < 1 + 1e-5).all())
    assert bool(torch.isfinite(fused(loud)).all())


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_under_a_window_nothing_is_as_long_as_the_text(
    monkeypatch: pytest.MonkeyPatch, kind: MaskKind
) -> None:
    """Masks and rows of all queries grow with the text, not with its square."""
    made: list[int] = []
    true = attention.visible_keys

    def watched(*given: Any, **named: Any) -> Tensor:
        found = true(*given, **named)
        made.append(found.numel())
        return found

    monkeypatch.setattr(attention, "visible_keys", watched)
    monkeypatch.setattr(attention, "_BLOCK_ENTRIES", 2000)
    entries = {}
    for keys in (500, 1000):
        made.clear()
        call = a_call(window=8, keys=keys, queries=keys, kind=kind)
        fused(call)
        for positions in torch.arange(keys).split(50):
            assert call.rows(positions).held.shape[-1] <= 50 + 2 * 8
        entries[keys] = sum(made)
    assert entries[1000] <= 2.1 * entries[500]


def test_rows_under_a_window_are_whole_when_asked() -> None:
    call = a_call(kv_heads=2, window=3, padding="left")
    rows, expected = call.rows(torch.tensor([7, 8])), slow_pattern(call)[:, :, 7:].float()
    assert (rows.first_key, rows.keys) == (5, slice(5, 9))
    assert rows.held.shape[-1] == 4
    assert not rows.is_whole
    torch.testing.assert_close(rows.pattern, expected, atol=2e-6, rtol=0)
    assert rows.is_whole
    other = replace(rows, pattern=expected)
    assert other.first_key == 0
    for one in (rows, other, rows.over(rows.held)):
        keys = torch.ones(BATCH, KEYS, dtype=torch.bool)
        torch.testing.assert_close(one.column_mass(keys), torch.ones(BATCH, HEADS, 2))
        torch.testing.assert_close(one.entropy, torch.special.entr(expected).sum(-1))
        at = torch.tensor([[4, 6]] * BATCH)
        assert one.at(at)[..., 0].isnan().all()  # out of the window
        torch.testing.assert_close(one.at(at)[..., 1], expected[..., 1, 6])
        no_sink = one.without_first(torch.tensor([5, 0]))
        assert not no_sink.pattern[0, ..., 5].any()
        torch.testing.assert_close(no_sink.pattern[1], expected[1])
