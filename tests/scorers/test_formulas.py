"""Every row scorer against a slow, obvious version, on random attention of random texts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.probes import Probe, from_tokens
from headscope.scorers import CATALOGUE, Scorer, relative_offset, window_mass
from headscope.scorers.patterns import mass_by_look_up, mass_by_mask
from headscope.views import AttentionRows
from tests.scorers.support import random_rows, rows_of, visible_keys

EXTRA = {"offset_3": relative_offset(3), "window_2": window_mass(2)}


@st.composite
def texts(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Short texts over few tokens, so with many repetitions; padding on either side.

    Tensors only: headscope's code is type-checked at random, which no strategy may be.
    """
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 14))
    token = st.integers(0, draw(st.integers(1, 12)))
    rows = draw(
        st.lists(st.lists(token, min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    tokens = torch.tensor(rows)
    real = torch.ones_like(tokens, dtype=torch.bool)
    for example in real:
        left = draw(st.integers(0, length - 1))
        right = draw(st.integers(0, length - 1 - left))
        example[:left] = False
        example[length - right :] = False
    return tokens, real


def marks_of(tokens: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Marks that any scorer may ask for, by token."""
    where = {
        "delimiter": tokens % 3 == 0,
        "needle": tokens % 3 == 1,
        "needle_answer": tokens % 6 == 1,
        "question": tokens % 2 == 0,
        "answering": tokens % 4 != 0,
    }
    return {name: mark & real for name, mark in where.items()}


def probe_of(text: tuple[Tensor, Tensor]) -> Probe:
    tokens, real = text
    return from_tokens(tokens, real, marks_of(tokens, real))


def keys_of(name: str, probe: Probe, b: int, i: int) -> set[int]:
    """The keys whose attention a scorer adds up, from its docstring."""
    text, first = probe.tokens[b].tolist(), int(probe.first[b])
    before = range(first, i)
    return {
        "previous_token": {i - 1},
        "current_token": {i},
        "offset_3": {i - 3},
        "first_token": {first},
        "delimiter": {j for j in range(i + 1) if probe.marks["delimiter"][b, j]},
        "duplicate_token": {j for j in before if text[j] == text[i]},
        "induction": {j + 1 for j in before if text[j] == text[i]},
        "local_window": set(range(i - 7, i + 1)),
        "window_2": {i - 1, i},
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "previous_token",
        "current_token",
        "offset_3",
        "first_token",
        "delimiter",
        "duplicate_token",
        "induction",
        "local_window",
        "window_2",
    ],
)
@settings(max_examples=25, deadline=None)
@given(text=texts(), window=st.sampled_from([None, 1, 3]), seed=st.integers(0, 9))
def test_mass_on_keys(
    name: str, text: tuple[Tensor, Tensor], window: int | None, seed: int
) -> None:
    probe = probe_of(text)
    scorer = EXTRA.get(name) or CATALOGUE[name]
    rows = random_rows(probe, window=window, seed=seed)
    values = scorer(rows, probe)
    for b, i in scorer.queries(probe).nonzero().tolist():
        wanted = [j for j in keys_of(name, probe, b, i) if j >= 0 and rows.visible[b, i, j]]
        for h in range(values.shape[1]):
            if wanted:
                expected = sum(rows.pattern[b, h, i, j].item() for j in wanted)
                assert values[b, h, i].item() == pytest.approx(expected, abs=1e-6)
                assert -1e-6 <= values[b, h, i] <= 1 + 1e-6
            else:  # out of reach is missing, not 0
                assert math.isnan(values[b, h, i])


@settings(max_examples=25, deadline=None)
@given(text=texts(), window=st.sampled_from([None, 3]))
def test_spread(text: tuple[Tensor, Tensor], window: int | None) -> None:
    probe = probe_of(text)
    rows = random_rows(probe, window=window)
    seen = {
        name: CATALOGUE[name](rows, probe)
        for name in ("entropy", "normalised_entropy", "attention_distance", "max_attention")
    }
    for b, i in CATALOGUE["entropy"].queries(probe).nonzero().tolist():
        row = [
            p for p, v in zip(rows.pattern[b, 0, i].tolist(), rows.visible[b, i], strict=True) if v
        ]
        keys = rows.visible[b, i].nonzero().flatten().tolist()
        entropy = -sum(p * math.log(p) for p in row if p > 0)
        assert seen["entropy"][b, 0, i].item() == pytest.approx(entropy, abs=1e-5)
        share = entropy / math.log(len(row))
        assert seen["normalised_entropy"][b, 0, i].item() == pytest.approx(share, abs=1e-5)
        distance = sum(p * (i - j) for p, j in zip(row, keys, strict=True))
        assert seen["attention_distance"][b, 0, i].item() == pytest.approx(distance, abs=1e-5)
        assert seen["max_attention"][b, 0, i].item() == pytest.approx(max(row), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(text=texts(), shift=st.sampled_from([0, 1]), window=st.sampled_from([None, 3]))
def test_look_up_and_mask_agree(
    text: tuple[Tensor, Tensor], shift: int, window: int | None
) -> None:
    probe = probe_of(text)
    rows = random_rows(probe, window=window)
    chosen = CATALOGUE["induction"].queries(probe)[:, None].expand_as(rows.pattern[..., 0])
    torch.testing.assert_close(
        mass_by_look_up(rows, probe, shift)[chosen],
        mass_by_mask(rows, probe, shift)[chosen],
        equal_nan=True,
    )


ROW_SCORERS = [
    scorer
    for scorer in CATALOGUE.values()
    if scorer.kind == "row" and "ioi" not in scorer.name and "bidirectional" not in scorer.needs
]


def view_of(scorer: Scorer, rows: AttentionRows, probe: Probe) -> AttentionRows:
    if scorer.reads == "rows_no_sink":
        return rows.without_first(probe.first)
    if scorer.reads == "rows_value_weighted":
        return rows.weighted(torch.ones_like(rows.pattern[:, :, 0]))
    return rows


@pytest.mark.parametrize("scorer", ROW_SCORERS, ids=lambda s: s.name)
@settings(max_examples=8, deadline=None)
@given(text=texts(), data=st.data())
def test_chunks_padding_and_order_change_nothing(
    scorer: Scorer, text: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    probe = probe_of(text)
    rows = random_rows(probe)
    chosen = scorer.queries(probe)
    whole = scorer(view_of(scorer, rows, probe), probe)
    keep = chosen[:, None].expand_as(whole)

    cut = data.draw(st.integers(1, probe.length - 1))
    parts = []
    for queries in (torch.arange(cut), torch.arange(cut, probe.length)):
        last = int(queries[-1]) + 1  # the key axis may end at the last visible key
        part = rows_of(rows.pattern, rows.visible, queries)
        part = AttentionRows(0, queries, part.pattern[..., :last], part.visible[..., :last])
        parts.append(scorer(view_of(scorer, part, probe), probe))
    torch.testing.assert_close(torch.cat(parts, -1)[keep], whole[keep], equal_nan=True)

    pad = data.draw(st.integers(1, 4))
    wider = torch.nn.functional.pad(rows.pattern, (pad, 0, pad, 0))
    real = torch.nn.functional.pad(probe.real, (pad, 0))
    shifted = from_tokens(
        torch.nn.functional.pad(probe.tokens, (pad, 0), value=3),
        real,
        {name: torch.nn.functional.pad(mark, (pad, 0)) for name, mark in probe.marks.items()},
    )
    moved = rows_of(wider, visible_keys(real))
    torch.testing.assert_close(
        scorer(view_of(scorer, moved, shifted), shifted)[..., pad:][keep],
        whole[keep],
        equal_nan=True,
    )
    torch.testing.assert_close(scorer.queries(shifted)[:, pad:], chosen)

    backwards = probe.examples(slice(None)).tokens.flip(0)
    flipped = from_tokens(
        backwards, probe.real.flip(0), {name: mark.flip(0) for name, mark in probe.marks.items()}
    )
    turned = rows_of(rows.pattern.flip(0), rows.visible.flip(0))
    torch.testing.assert_close(
        scorer(view_of(scorer, turned, flipped), flipped).flip(0)[keep], whole[keep], equal_nan=True
    )


@pytest.mark.parametrize("scorer", ROW_SCORERS, ids=lambda s: s.name)
def test_bounds_hold_and_inputs_stay(scorer: Scorer) -> None:
    tokens = torch.randint(0, 9, (3, 160))  # some scorers ask for tokens further back than 144
    probe = from_tokens(tokens, marks=marks_of(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    rows = random_rows(probe)
    before = (
        rows.pattern.clone(),
        rows.visible.clone(),
        probe.tokens.clone(),
        probe.structure.clone(),
    )
    values = scorer(view_of(scorer, rows, probe), probe)
    after = rows.pattern, rows.visible, probe.tokens, probe.structure
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    values = values[scorer.queries(probe)[:, None].expand_as(values)]
    known = values[~values.isnan()]
    low, high = scorer.bounds
    assert len(known) > 0
    assert low is None or known.min() >= low - 1e-6
    assert high is None or known.max() <= high + 1e-6
