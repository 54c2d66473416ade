"""Scorers of head outputs against per-token, per-head arithmetic on the whole vocabulary."""

from dataclasses import replace

import pytest
import torch

from headscope.probes import Probe, from_tokens
from headscope.scorers import CATALOGUE
from headscope.views import HeadOutputs, QueryKeys, Unembedding
from tests.scorers.support import random_rows

HEADS, D_HEAD, D_MODEL, D_VOCAB = 3, 4, 10, 13


def unembedding(centred: bool) -> Unembedding:
    return Unembedding(
        W_U=torch.randn(D_VOCAB, D_MODEL),
        b_U=None,
        gain=torch.rand(D_MODEL) + 0.5,
        bias=torch.randn(D_MODEL),
        centred=centred,
        epsilon=1e-5,
        logit_scale=0.5,
    )


def outputs_of(probe: Probe, centred: bool = True, **weights: torch.Tensor) -> HeadOutputs:
    rows = random_rows(probe, HEADS)
    values = torch.randn(len(probe), 1, probe.length, D_HEAD)
    query = torch.randn(len(probe), HEADS, probe.length, D_HEAD)
    matches = QueryKeys(0, rows.query_pos, query, values, 1.0, None, rows.visible)
    made = HeadOutputs(
        layer=0,
        query_pos=rows.query_pos,
        z=torch.randn(len(probe), probe.length, HEADS, D_HEAD),
        W_O=torch.randn(HEADS, D_HEAD, D_MODEL),
        unembedding=unembedding(centred),
        make_rows=lambda: rows,
        make_values=lambda: values,
        make_query_keys=lambda: matches,
    )
    return replace(made, **weights)


def probe() -> Probe:
    tokens = torch.randint(0, D_VOCAB, (2, 9))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, 7:] = False
    marks = dict.fromkeys(("needle", "needle_answer", "answering"), real & (tokens % 2 == 0))
    made = from_tokens(tokens, real, marks)
    foils = (made.targets + 1) % D_VOCAB
    return replace(made, foils=foils.where(made.targets >= 0, -1))


def logits(outputs: HeadOutputs) -> torch.Tensor:
    """What each head's write adds to each logit at scale 1: ``[batch query head d_vocab]``."""
    write = torch.einsum("bqhe,hem->bqhm", outputs.z, outputs.W_O)
    if outputs.unembedding.centred:
        write = write - write.mean(-1, keepdim=True)
    return (
        write
        * outputs.unembedding.gain
        @ outputs.unembedding.W_U.T
        * outputs.unembedding.logit_scale
    )


@pytest.mark.parametrize("centred", [True, False])
def test_direct_logit_attribution_is_the_logit_above_the_mean(centred: bool) -> None:
    p = probe()
    outputs = outputs_of(p, centred)
    all_logits = logits(outputs)
    above = all_logits - all_logits.mean(-1, keepdim=True)
    scorer, pair = CATALOGUE["direct_logit_attribution"], CATALOGUE["direct_logit_difference"]
    values, difference = scorer(outputs, p), pair(outputs, p)
    chosen = scorer.queries(p)
    assert chosen.equal(pair.queries(p))
    assert values.isnan()[~(p.targets >= 0)[:, None].expand_as(values)].all()
    for b, i in chosen.nonzero().tolist():
        right, wrong = int(p.targets[b, i]), int(p.foils[b, i])
        torch.testing.assert_close(values[b, :, i], above[b, i, :, right])
        gap = all_logits[b, i, :, right] - all_logits[b, i, :, wrong]
        torch.testing.assert_close(difference[b, :, i], gap, atol=1e-5, rtol=1e-5)


def test_a_write_that_raises_every_logit_alike_attributes_nothing() -> None:
    p = probe()
    outputs = outputs_of(p, centred=False)
    flat = replace(outputs.unembedding, W_U=torch.ones(D_VOCAB, D_MODEL))
    values = CATALOGUE["direct_logit_attribution"](replace(outputs, unembedding=flat), p)
    assert values.nan_to_num().abs().max() < 1e-5


def test_only_the_second_copy_is_asked() -> None:
    tokens = torch.tensor([[0, 1, 2, 3, 1, 2, 3]])
    second = torch.tensor([[False] * 4 + [True] * 3])
    p = from_tokens(tokens, marks={"second_copy": second})
    chosen = CATALOGUE["direct_logit_attribution"].queries(p)
    assert chosen.tolist() == [[False] * 4 + [True, True, False]]
    assert not CATALOGUE["direct_logit_difference"].queries(p).any()


def test_copying_against_the_whole_vocabulary() -> None:
    p = probe()
    outputs = outputs_of(p)
    up = logits(outputs)
    up = (up - up.mean(-1, keepdim=True)).relu()
    values = CATALOGUE["copying"](outputs, p)
    for b, i in CATALOGUE["copying"].queries(p).nonzero().tolist():
        text = p.tokens[b][p.real[b]].tolist()
        for h in range(HEADS):
            row = outputs.rows.pattern[b, h, i].tolist()
            attended = sum(a * up[b, i, h, t].item() for a, t in zip(row, text, strict=False))
            raised = sum(up[b, i, h, t].item() for t in set(text))
            expected = attended / raised if raised else 0.0
            assert values[b, h, i].item() == pytest.approx(expected, abs=1e-5)
            assert 0 <= values[b, h, i] <= 1


def test_copying_counts_all_tokens_whatever_the_chunk() -> None:
    p = probe()
    outputs = outputs_of(p)
    early = torch.arange(3)
    rows = outputs.rows
    short = replace(
        rows, query_pos=early, pattern=rows.pattern[:, :, :3, :3], visible=rows.visible[:, :3, :3]
    )
    part = replace(outputs, query_pos=early, z=outputs.z[:, :3], make_rows=lambda: short)
    whole = CATALOGUE["copying"](outputs, p)[..., :3]
    torch.testing.assert_close(CATALOGUE["copying"](part, p), whole)


def test_a_head_that_writes_nothing_copies_nothing() -> None:
    p = probe()
    outputs = outputs_of(p, W_O=torch.zeros(HEADS, D_HEAD, D_MODEL))
    assert CATALOGUE["copying"](outputs, p).abs().max() == 0
    assert CATALOGUE["head_output_norm"](outputs, p).abs().max() == 0


def test_norm_is_the_length_of_the_write() -> None:
    p = probe()
    outputs = outputs_of(p)
    write = torch.einsum("bqhe,hem->bhqm", outputs.z, outputs.W_O)
    torch.testing.assert_close(CATALOGUE["head_output_norm"](outputs, p), write.norm(dim=-1))


@pytest.mark.parametrize("name", [n for n, s in CATALOGUE.items() if s.kind == "output"])
def test_inputs_stay(name: str) -> None:
    p = probe()
    outputs = outputs_of(p)
    held = (
        outputs.z,
        outputs.W_O,
        outputs.unembedding.W_U,
        outputs.rows.pattern,
        p.tokens,
        p.targets,
    )
    before = [tensor.clone() for tensor in held]
    CATALOGUE[name](outputs, p)
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))
