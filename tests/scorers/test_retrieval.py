"""The retrieval scorers against slow loops over examples, heads, queries and keys."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.errors import InputError
from headscope.probes import Probe, from_tokens
from headscope.scorers import CATALOGUE, long_need, long_need_predicted, streaming_gap
from headscope.scorers.long_need import far_keys, plane_shares
from headscope.views import AttentionRows, HeadOutputs, QueryKeys, Rotation
from tests.scorers.support import random_rows, visible_keys
from tests.scorers.test_outputs import D_HEAD, D_VOCAB, HEADS, outputs_of

WINDOWS = [None, 8]


def probe(length: int = 18, batch: int = 3) -> Probe:
    """Random tokens over few words, so that copies happen; padding on the right of the first."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, D_VOCAB, (batch, length), generator=generator)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, length - 2 :] = False
    at = torch.arange(length)
    marks = {
        "needle": (at >= 3) & (at < 8),
        "needle_answer": (at >= 5) & (at < 8),
        "question": (at >= 9) & (at < 12),
        "answering": (at >= 12) & (at < 15),
    }
    spread = {name: mark.expand(batch, -1) & real for name, mark in marks.items()}
    spread["needle"] = spread["needle"].clone()
    spread["needle"][1, 8] = True  # needles differ in length
    return from_tokens(tokens, real, spread)


def where(p: Probe, mark: str, b: int) -> list[int]:
    return p.mark(mark)[b].nonzero().flatten().tolist()


def slow(name: str, p: Probe, rows: AttentionRows, b: int, h: int, i: int) -> float:
    """One value from one row, by the words of the docstring."""
    row = rows.pattern[b, h, i].tolist()
    best = row.index(max(row))
    right = int(p.tokens[b, best]) == int(p.targets[b, i])
    needle, answer = where(p, "needle", b), where(p, "needle_answer", b)
    ranked = sorted(range(len(row)), key=lambda j: -row[j])[: len(needle)]
    return {
        "retrieval": float(best in answer and right),
        "retrieval_first_token": float(best in answer and right),
        "retrieval_needle_only": float(best in needle),
        "retrieval_copy_only": float(right),
        "needle_mass": sum(row[j] for j in needle),
        "query_focused_retrieval": sum(row[j] for j in needle),
        "importance_weighted_retrieval": sum(row[j] for j in ranked if j in needle),
    }[name]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "name",
    [
        "retrieval",
        "retrieval_first_token",
        "retrieval_needle_only",
        "retrieval_copy_only",
        "needle_mass",
        "query_focused_retrieval",
        "importance_weighted_retrieval",
    ],
)
def test_row_scorers_do_what_they_say(name: str, window: int | None) -> None:
    p, scorer = probe(), CATALOGUE[name]
    targets = p.targets.clone()
    targets[:, 12] = p.tokens[:, 5]  # so that the answer's first token is in the needle
    p = replace(p, targets=targets)
    found = set()
    for seed in range(6):
        rows = random_rows(p, HEADS, window=window, seed=seed)
        values = scorer(rows, p)
        asked = "question" if name == "query_focused_retrieval" else "answering"
        chosen = scorer.queries(p)
        expected = p.mark(asked)
        if name == "retrieval_first_token":
            expected = expected & (torch.arange(p.length) == 12)
        assert chosen.equal(expected)
        for b, i in chosen.nonzero().tolist():
            copies = name in ("retrieval", "retrieval_first_token")
            key = "needle_answer" if copies else "needle"
            hidden = not any(rows.visible[b, i, j] for j in where(p, key, b))
            for h in range(HEADS):
                value = float(values[b, h, i])
                if hidden and name != "retrieval_copy_only":
                    assert math.isnan(value)
                else:
                    assert value == pytest.approx(slow(name, p, rows, b, h, i), abs=1e-6)
                    found.add(round(value, 3))
    assert len(found) > 1  # not the same value everywhere


def test_ties_go_to_the_lowest_key() -> None:
    p = from_tokens(
        [[1, 2, 3, 2]], marks={"needle_answer": torch.tensor([[False, True, False, False]])}
    )
    p = replace(p, targets=torch.tensor([[-1, -1, -1, 2]]))
    pattern = torch.tensor([[[[0.0, 0.5, 0.0, 0.5]]]])
    visible = visible_keys(p.real)[:, 3:]
    rows = AttentionRows(0, torch.tensor([3]), pattern, visible)
    assert CATALOGUE["retrieval"](rows, p).tolist() == [[[1.0]]]


@pytest.mark.parametrize("name", ["needle_write", "needle_write_contrast"])
def test_writes_are_sums_over_keys(name: str) -> None:
    p = probe()
    outputs = outputs_of(p)
    rows, values = outputs.rows, outputs.values
    z = outputs.averaged(rows.pattern)
    outputs = replace(outputs, z=z)
    scored = CATALOGUE[name](outputs, p)
    for b, i in CATALOGUE[name].queries(p).nonzero().tolist():
        target = int(p.targets[b, i])
        direction = (
            outputs.unembedding.directions(torch.tensor(target))
            - outputs.unembedding.mean_direction
        )
        for h in range(HEADS):
            parts = [
                float(rows.pattern[b, h, i, j] * (values[b, 0, j] @ outputs.W_O[h] @ direction))
                for j in range(i + 1)
            ]
            needle = sum(parts[j] for j in where(p, "needle", b))
            rest = sum(parts) - needle
            expected = needle if name == "needle_write" else needle - rest
            assert float(scored[b, h, i]) == pytest.approx(expected, abs=1e-4)


def test_the_needle_and_the_rest_make_the_direct_attribution() -> None:
    p = probe()
    outputs = outputs_of(p)
    outputs = replace(outputs, z=outputs.averaged(outputs.rows.pattern))
    needle, contrast = (CATALOGUE[n](outputs, p) for n in ("needle_write", "needle_write_contrast"))
    whole = CATALOGUE["direct_logit_attribution"](outputs, p)
    keep = p.mark("answering")[:, None].expand_as(whole)
    torch.testing.assert_close((2 * needle - contrast)[keep], whole[keep], atol=1e-4, rtol=1e-4)


def query_keys_of(
    p: Probe, window: int | None = None, kv_heads: int = 1, size: int = D_HEAD
) -> QueryKeys:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(len(p), HEADS, p.length, size, generator=generator)
    key = torch.randn(len(p), kv_heads, p.length, size, generator=generator)
    visible = visible_keys(p.real, window)
    return QueryKeys(0, torch.arange(p.length), query, key, 0.7, None, visible)


def outputs_with(p: Probe, window: int | None, learned_sink: bool) -> HeadOutputs:
    """Head outputs whose rows, values, queries and keys belong together."""
    matches = query_keys_of(p, window)
    scores = matches.scores.masked_fill(~matches.visible[:, None], -torch.inf)
    total = torch.exp(torch.tensor(0.3)) if learned_sink else torch.tensor(0.0)
    grown = scores.exp()
    pattern = grown / (grown.sum(-1, keepdim=True) + total)
    rows = AttentionRows(0, matches.query_pos, pattern, matches.visible)
    outputs = outputs_of(p, make_rows=lambda: rows, make_query_keys=lambda: matches)
    return replace(outputs, z=outputs.averaged(pattern))


@pytest.mark.parametrize("learned_sink", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_streaming_gap_is_that_of_a_smaller_softmax(window: int | None, learned_sink: bool) -> None:
    p = probe()
    outputs = outputs_with(p, window, learned_sink)
    sink, recent = 2, 3
    scorer = streaming_gap(sink, recent)
    found = scorer(outputs, p)
    for b, i in scorer.queries(p).nonzero().tolist():
        seen = outputs.rows.visible[b, i].nonzero().flatten().tolist()
        kept = [j for j in seen if j < sink or j > i - recent]
        for h in range(HEADS):
            if len(kept) == len(seen):
                assert math.isnan(float(found[b, h, i]))
                continue

            def write(keys: list[int], b: int = b, h: int = h, i: int = i) -> Tensor:
                weight = outputs.query_keys.scores[b, h, i, keys].double().exp()
                extra = math.exp(0.3) if learned_sink else 0.0
                z = (weight / (weight.sum() + extra)) @ outputs.values[b, 0, keys].double()
                return z @ outputs.W_O[h].double()

            full, stream = write(seen), write(kept)
            expected = float((full - stream).norm() / (full.norm() + stream.norm()))
            assert float(found[b, h, i]) == pytest.approx(expected, abs=1e-4)


def test_a_head_that_looks_far_loses_all_and_a_local_one_nothing() -> None:
    p = probe()
    outputs = outputs_with(p, None, learned_sink=False)
    far = outputs.query_keys.scores.clone()
    far[:, 0, :, 5] += 200  # exactly 0 on everything local, in fp32
    far[:, 1, :, 0] += 200
    matches = replace(outputs.query_keys)
    object.__setattr__(matches, "scores", far)
    pattern = far.masked_fill(~matches.visible[:, None], -torch.inf).softmax(-1)
    rows = AttentionRows(0, matches.query_pos, pattern, matches.visible)
    outputs = outputs_of(p, make_rows=lambda: rows, make_query_keys=lambda: matches)
    outputs = replace(outputs, z=outputs.averaged(pattern))
    found = streaming_gap(2, 3)(outputs, p)[:, :, 12:15]
    assert found.isfinite().all()
    assert (found[:, 0] > 0.2).all()
    assert (found[:, 1] < 1e-5).all()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("moments", ["bulk", "local"])
def test_predicted_need_is_the_formula_in_keys(moments: str, window: int | None) -> None:
    """With mean and covariance of the keys, as a cache would keep them, in fp64."""
    p = probe()
    seen, sink, recent, tau = query_keys_of(p, window), 2, 4, 0.6
    scored = long_need_predicted(sink, recent, tau, moments)(seen, p)
    both = long_need_predicted(sink, recent, tau, moments, both=True)(seen, p)
    rows = AttentionRows(
        0,
        seen.query_pos,
        seen.scores.masked_fill(~seen.visible[:, None], -torch.inf).softmax(-1),
        seen.visible,
    )
    exact = long_need(sink, recent, tau)(rows, p)
    values = set()
    for b, i in long_need(sink, recent).queries(p).nonzero().tolist():
        keys = seen.visible[b, i].nonzero().flatten().tolist()
        local = [j for j in keys if j < sink or j > i - recent]
        bulk = [j for j in keys if j not in local]
        of = bulk if moments == "bulk" else [j for j in keys if j > i - recent]
        for h in range(HEADS):
            if not bulk:
                assert math.isnan(float(scored[b, h, i]))
                assert math.isnan(float(exact[b, h, i]))
                continue
            q, k = seen.query[b, h, i].double() * 0.7, seen.key[b, 0].double()
            near = (k[local] @ q).exp().sum()
            centre = k[of].mean(0)
            covariance = (k[of] - centre).T @ (k[of] - centre) / len(of)
            guess = len(bulk) * math.exp(float(q @ centre + q @ covariance @ q / 2))
            truth = (k[bulk] @ q).exp().sum()
            said, is_long = float(near / (near + guess)) < tau, float(near / (near + truth)) < tau
            assert bool(scored[b, h, i]) == said
            assert bool(exact[b, h, i]) == is_long
            assert bool(both[b, h, i]) == (said and is_long)
            values.add((said, is_long))
    assert len(values) > 1


def test_rotary_slowness_is_a_correlation_over_planes() -> None:
    p = probe()
    first, second = (0, 1, 2, 3), (4, 5, 6, 7)
    speed = torch.tensor([0.1, 1.0, 0.001, 0.01], dtype=torch.float64)
    seen = replace(query_keys_of(p, size=8), rotation=Rotation(first, second, speed))
    order = [1, 0, 3, 2]  # from the fastest to the slowest
    found = CATALOGUE["rotary_slowness"](seen, p)
    for b, i in CATALOGUE["rotary_slowness"].queries(p).nonzero().tolist():
        far = [j for j in range(i + 1) if j < i / 2]
        for h in range(HEADS):
            sizes = []
            for plane in order:
                a, c = first[plane], second[plane]
                q, k = seen.query[b, h, i], seen.key[b, 0]
                sizes.append(sum(abs(float(q[a] * k[j, a] + q[c] * k[j, c])) for j in far))
            expected = np.corrcoef(np.array(sizes) / sum(sizes), np.arange(4))[0, 1]
            assert float(found[b, h, i]) == pytest.approx(expected, abs=1e-4)
    shares = plane_shares(seen, far_keys(seen))[:, :, 12:15]
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
    planes = sum(seen.products(torch.tensor(pair)) for pair in zip(first, second, strict=True))
    torch.testing.assert_close(planes, seen.scores, atol=1e-5, rtol=1e-4)


def test_widths_that_leave_nothing_local_refuse() -> None:
    for make in (streaming_gap, long_need, long_need_predicted):
        with pytest.raises(InputError, match="recent=0"):
            make(3, 0)
    with pytest.raises(InputError, match="needs="):
        CATALOGUE["rotary_slowness"](query_keys_of(probe()), probe())


def test_what_makes_no_sense_is_said() -> None:
    for threshold in (0, 1, -0.5, math.nan):
        for make in (long_need, long_need_predicted):
            with pytest.raises(InputError, match=r"share of the attention|threshold=nan"):
                make(threshold=threshold)
