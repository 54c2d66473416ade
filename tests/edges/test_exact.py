"""Attribution whose parts sum to the whole, against models written out by hand."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.edges.compare import heads_out
from headscope.edges.contextual import NodeWrite, heads_value, run_split
from headscope.edges.discrete import unique_codes
from headscope.edges.exact import _slope
from headscope.edges.written import EdgeMeasurement, PaddedTexts, run_apart
from headscope.errors import HeadscopeWarning, InputError
from headscope.metrics import logit_difference
from headscope.models.protocol import HeadModel
from headscope.models.taps import Tap
from headscope.probes import from_tokens
from tests.edges.helpers import fresh, last_difference, pair
from tests.edges.plain import Plain
from tests.edges.test_attribute import linear_net

FAMILIES = [
    "gpt2", "llama", "qwen2", "qwen3", "gpt_neox", "granite", "cohere2", "opt", "mixtral",
]  # fmt: skip


@cache
def model_of(family: str) -> HeadModel:
    return hs.load(fresh(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_sum_to_the_score(family: str) -> None:
    found = hs.edges.score_attribution(model_of(family), pair("right"), "L1H1", query=5, key=3)
    assert found.gap < 1e-6
    assert abs(found.score) > 1e-3
    assert found.pairs.shape == (len(found.names), len(found.names))


def test_one_pair_by_hand() -> None:
    model, probe = model_of("gpt2"), pair()
    found = hs.edges.score_attribution(model, probe, "L1H2", query=6, key=2, example=1)
    body = model.module.transformer
    with torch.no_grad():
        streams = body(probe.tokens[1:2], output_hidden_states=True).hidden_states[1][0]
        embed = body.wte(probe.tokens[1]) + body.wpe(torch.arange(probe.length))
        block, heads = body.h[1], slice(16, 24)
        weight = block.attn.c_attn.weight

        def read(at: int, first: int) -> Tensor:
            x = embed[at] - embed[at].mean()
            x = x / (streams[at].var(correction=0) + block.ln_1.eps).sqrt() * block.ln_1.weight
            return x @ weight[:, first : first + 32][:, heads]

        expected = read(6, 0) @ read(2, 32) / 8**0.5
    assert found.names[0] == "embed"
    assert found.pairs[0, 0] == pytest.approx(float(expected), abs=1e-5)


def test_parts_of_bfloat16_come_with_a_warning() -> None:
    model = hs.load(fresh("llama").bfloat16())
    with pytest.warns(HeadscopeWarning, match="load it in float32"):
        hs.edges.score_attribution(model, pair(), "L1H0", query=5, key=3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("held", [True, False])
def test_heads_mlps_and_bypass_are_the_effect(family: str, held: bool) -> None:
    for upstream in ("embed", "L0H1", "MLP0"):
        found = hs.edges.head_loadings(
            model_of(family), pair("right"), logit_difference, upstream, held=held
        )
        parts = found.heads.sum() + found.mlps.sum() + found.bypass
        assert parts == pytest.approx(found.effect, abs=1e-5 * max(1, abs(found.effect)))
        assert abs(found.effect) > 1e-4


def test_what_carries_the_embedding_is_the_corrupt_run() -> None:
    """With nothing held, the embedding taken out is the run on the other text."""
    model, probe = model_of("gpt2"), pair()
    assert probe.corrupt is not None
    found = hs.edges.head_loadings(model, probe, logit_difference, "embed", held=False)
    study = EdgeMeasurement.of(model, probe, logit_difference)
    batch = next(study.batches())
    slope = _slope(batch, Tap("resid_post", 1))
    other = run_apart(model, PaddedTexts(probe.corrupt.tokens, probe.real)).sources
    change = ((other - batch.clean.sources) * slope[:, None]).sum((2, 3)).mean(0)
    assert found.bypass == pytest.approx(float(change[0]), abs=1e-5)
    np.testing.assert_allclose(found.heads[0], change[1:5], atol=1e-5)
    np.testing.assert_allclose(found.mlps, change[[5, 10]], atol=1e-5)


def test_in_a_linear_net_the_decomposition_is_patching() -> None:
    model, probe = hs.load(linear_net()), pair()
    found = hs.edges.contextual(model, probe, logit_difference, positions=True)
    expected = heads_out(EdgeMeasurement.of(model, probe, logit_difference)).mean(-1)
    np.testing.assert_allclose(found.scores.mean, expected, atol=2e-5)
    assert found.by_position is not None
    np.testing.assert_allclose(found.by_position.sum(-1), expected, atol=1e-4)
    ruled = hs.edges.contextual(model, probe, logit_difference, sign_rule=True)
    assert np.abs(ruled.scores.mean - expected).max() > 0.1


def by_hand(model: HeadModel, tokens: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts of the logits of a GPT-2 of two layers when a head of layer 0 is the source."""
    body, relevant = model.module.transformer, -change
    rest = torch.zeros(())

    def mapped(r: Tensor, i: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        a, b = r @ weight, i @ weight
        share = a.abs() / (a.abs() + b.abs() + 1e-8)
        return a + bias * share, b + bias * (1 - share)

    def normed(r: Tensor, i: Tensor, norm: torch.nn.LayerNorm) -> tuple[Tensor, Tensor]:
        scale = ((r + i).var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        share = r.abs() / (r.abs() + i.abs() + 1e-8)
        parts = [(one - one.mean(-1, keepdim=True)) / scale * norm.weight for one in (r, i)]
        return parts[0] + norm.bias * share, parts[1] + norm.bias * (1 - share)

    def mlp(r: Tensor, i: Tensor, block: torch.nn.Module) -> tuple[Tensor, Tensor]:
        r, i = mapped(*normed(r, i, block.ln_2), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        r, i = block.mlp.act(r + i) - block.mlp.act(i), block.mlp.act(i)
        return mapped(r, i, block.mlp.c_proj.weight, block.mlp.c_proj.bias)

    kept: dict[Tap, Tensor] = {}
    model.run(
        from_tokens(tokens),
        reads={
            Tap(site, 0): lambda view: kept.update({view.tap: view.value.clone()})
            for site in ("resid_pre", "attn_out")
        },
    )
    r, i = relevant, kept[Tap("resid_pre", 0)] + kept[Tap("attn_out", 0)] - relevant
    more = mlp(r, i, body.h[0])
    r, i = r + more[0], i + more[1]
    block = body.h[1]
    at = normed(r, i, block.ln_1)
    weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
    q, k = ((at[0] + at[1]) @ weight + bias)[..., :64].split(32, -1)
    v = mapped(*at, weight[:, 64:], bias[64:])

    def apart(x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 8)).transpose(1, 2)

    scores = apart(q) @ apart(k).mT / 8**0.5
    pattern = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -1e30).softmax(-1)
    z = [(pattern @ apart(one)).transpose(1, 2).flatten(2) for one in v]
    more = mapped(z[0], z[1], block.attn.c_proj.weight, block.attn.c_proj.bias)
    r, i = r + more[0], i + more[1]
    more = mlp(r, i, block)
    r, i = normed(r + more[0], i + more[1], body.ln_f)
    head = model.module.lm_head.weight.mT
    return r @ head + rest, i @ head


@torch.no_grad()
def test_parts_are_those_propagated_by_hand() -> None:
    model, probe = model_of("gpt2"), pair()
    study = EdgeMeasurement.of(model, probe, logit_difference)
    batch = next(study.batches())
    relevant, rest = by_hand(model, probe.tokens, batch.change[:, 2])
    whole = model.module(probe.tokens).logits
    torch.testing.assert_close(relevant + rest, whole, atol=1e-4, rtol=1e-5)
    found = hs.edges.contextual(model, probe, logit_difference)
    expected = last_difference(rest, probe) - last_difference(whole, probe)
    assert found.scores.examples is not None
    np.testing.assert_allclose(found.scores.examples[0, 1], expected, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("sign_rule", [False, True])
def test_the_whole_beside_its_parts_is_the_clean_run(family: str, sign_rule: bool) -> None:
    """At every tap the whole is what the model computes; no change has no relevant part."""
    study = EdgeMeasurement.of(model_of(family), pair("right"), logit_difference)
    batch = next(study.batches())
    taps = [Tap(site, n) for n in range(2) for site in ("value", "z", "mlp_out", "resid_post")]
    nothing = NodeWrite(Tap("embed"), torch.zeros_like(batch.change[:, 0]))
    run = run_split(batch, [NodeWrite.of(batch, 2), nothing], taps, sign_rule=sign_rule)
    real = batch.texts.real
    for tap in taps:
        clean, whole = batch.clean.taps[tap], run.whole(tap)
        if tap.site == "value":
            clean, whole = clean.transpose(1, 2), whole.transpose(1, 2)
        torch.testing.assert_close(whole[real], clean[real], atol=2e-5, rtol=1e-5)
        assert not run.relevant(tap)[1].any()
        if tap.site == "resid_post":
            assert run.relevant(tap)[0].any()
    assert not run.relevant(Tap("z", 0))[0].any()  # the source writes behind it


def test_the_search_goes_backwards() -> None:
    found = hs.edges.contextual(model_of("gpt2"), pair(), logit_difference)
    rounds = found.search(keep=1, rounds=3)
    assert rounds[0] == (found.top(1)[0][0],)
    assert (found.passed >= 0).all()
    assert (found.passed <= 1).all()
    assert not found.passed[1].any()
    with pytest.raises(InputError, match="1 or more of each"):
        found.search(keep=0)


def test_heads_at_positions_are_searched_as_written_down() -> None:
    """Both rounds and the pruning by single runs, one source at a time."""
    model, probe = model_of("gpt2"), pair()
    found = hs.edges.contextual_circuit(model, probe, logit_difference, keep=2, rounds=2)
    apart = hs.edges.contextual(model, probe, logit_difference, positions=True).by_position
    assert apart is not None
    first = np.argsort(-np.abs(apart), axis=None)[:2]
    expected = [tuple(map(int, np.unravel_index(at, apart.shape))) for at in first]
    assert list(found.nodes[:2]) == expected
    np.testing.assert_allclose(found.shares[:2], apart.flat[first], rtol=1e-4)
    study = EdgeMeasurement.of(model, probe, logit_difference)
    (batch,) = study.batches()
    for at in np.flatnonzero(found.rounds == 2):
        target, source = found.nodes[found.targets[at]], found.nodes[at]
        assert target.layer == 1
        tap = Tap("z", 1)
        run = run_split(batch, [NodeWrite.of(batch, 1 + source.head, source.pos)], [tap])
        relevant, rest = run.relevant(tap)[0], run.taps[tap][1]
        sizes = [float(one[:, target.pos, target.head].abs().mean()) for one in (relevant, rest)]
        assert found.shares[at] == pytest.approx(sizes[0] / sum(sizes), rel=1e-4)
    kept = torch.zeros(2, 4, probe.length, dtype=torch.bool)
    for node in found.circuit:
        kept[node] = True
    assert found.value == pytest.approx(float(heads_value(batch, kept).mean()), abs=1e-5)
    assert "@" in str(found)


@torch.no_grad()
def test_heads_outside_write_what_they_write_once_taken_out() -> None:
    """All positions of some heads: the model written out, all edges of the others taken out."""
    model, probe = model_of("llama"), pair("right")
    assert probe.corrupt is not None
    plain = Plain(model.module, probe.tokens, probe.real)
    corrupt = Plain(model.module, probe.corrupt.tokens, probe.real).run((), {})[1]
    study = EdgeMeasurement.of(model, probe, logit_difference)
    (batch,) = study.batches()
    for inside in ({"L0H1", "L1H2"}, set(), {str(head) for head in model.shape.heads}):
        kept = torch.zeros(2, 4, probe.length, dtype=torch.bool)
        for name in inside:
            kept[hs.HeadIndex.parse(name)] = True
        out = [
            edge for edge in study.wiring.edges
            if edge.source.startswith("L") and edge.source not in inside
        ]  # fmt: skip
        expected = last_difference(plain.run(out, corrupt)[0], probe)
        torch.testing.assert_close(heads_value(batch, kept), expected, atol=3e-5, rtol=1e-5)


def test_in_a_linear_net_nodes_add_up() -> None:
    """The metric without some heads at positions is the whole and their scores."""
    model, probe = hs.load(linear_net()), pair()
    scores = hs.edges.contextual(model, probe, logit_difference, positions=True).by_position
    assert scores is not None
    study = EdgeMeasurement.of(model, probe, logit_difference)
    (batch,) = study.batches()
    kept = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = float((heads_value(batch, kept) - batch.clean_value()).mean())
    assert found == pytest.approx(float(scores[~kept.numpy()].sum()), abs=1e-4)
    wide = hs.edges.contextual_circuit(
        model, probe, logit_difference, keep=scores.size, rounds=1, tolerance=0.0
    )
    assert len(wide.nodes) == int((np.abs(scores) > 1e-6 * np.abs(scores).max()).sum())
    # What is left are the nodes that help: without each of them it would be nearer to nothing.
    sign = np.sign(wide.full - wide.empty)
    assert sign * (wide.value - wide.unpruned) >= -1e-5
    assert all(sign * scores[node] < 1e-5 for node in wide.circuit)


def test_a_circuit_of_positions_is_kept_and_shown(tmp_path: Path) -> None:
    found = hs.edges.contextual_circuit(model_of("gpt2"), pair(), logit_difference, rounds=2)
    found.save(tmp_path / "c.safetensors")
    again = hs.edges.PositionCircuit.load(tmp_path / "c.safetensors")
    assert again.circuit == found.circuit
    assert repr(again) == repr(found)
    assert len(again.to_pandas()) == len(found.nodes)
    assert hs.plots.position_circuit(again).data
    with pytest.raises(InputError, match="texts of equal length"):
        hs.edges.contextual_circuit(model_of("gpt2"), pair("right"), logit_difference)
    with pytest.raises(InputError, match="texts of equal length"):
        hs.edges.contextual(model_of("gpt2"), pair("right"), logit_difference, positions=True)
    with pytest.raises(InputError, match=r"tolerance=-1\.0"):
        hs.edges.contextual_circuit(model_of("gpt2"), pair(), logit_difference, tolerance=-1.0)


def test_codes_are_counted_as_sets() -> None:
    codes = np.array([[1, 4, -1], [2, 4, -1], [3, 4, 7], [3, 4, 7], [3, 5, -1], [3, 4, -1]])
    positive = np.array([True, True, True, False, False, False])
    assert unique_codes(codes, positive).tolist() == [2, 0, 0]
    assert unique_codes(codes, positive, normalised=True).tolist() == pytest.approx([2 / 3, 0, 0])


def test_a_head_whose_codes_tell_the_kinds_apart_comes_first() -> None:
    """In a model whose first layer attends to each token alone, one head writes for some tokens."""
    module = fresh("gpt2")
    with torch.no_grad():
        for block in module.transformer.h:
            block.attn.c_proj.weight[8:] = 0.0
    drawn = torch.Generator().manual_seed(0)
    sides = [from_tokens(torch.randint(low, low + 25, (24, 6), generator=drawn)) for low in (3, 30)]
    found = hs.edges.discrete(hs.load(module), *sides, steps=150, penalty=1e-4)
    silent = found.scores.mean[:, 1:]
    assert not silent.any()
    assert found.scores.mean[:, 0].max() > found.scores.null[:, 0].max()
    assert np.array_equal(found.edges, found.edges.T)
    assert not np.diag(found.edges).any()
    same = hs.edges.discrete(hs.load(module), sides[0], sides[0], steps=20)
    assert not same.scores.mean.any()
    assert (same.scores.p_value == 1).all()


def test_mistakes_get_a_sentence() -> None:
    model, probe = model_of("gpt2"), pair()
    cases = {
        "did you mean": lambda: hs.edges.head_loadings(model, probe, logit_difference, "L0H9"),
        "does not read": lambda: hs.edges.head_loadings(model, probe, logit_difference, "MLP1", 1),
        "cannot attend": lambda: hs.edges.score_attribution(model, probe, "L1H0", 2, 5),
        "none has number": lambda: hs.edges.score_attribution(
            model, probe, "L1H0", 5, 2, example=9
        ),
        "equally many": lambda: hs.edges.discrete(model, probe, probe.examples(slice(0, 1))),
        "1 or more": lambda: hs.edges.discrete(model, probe, probe, steps=0),
    }
    for said, call in cases.items():
        with pytest.raises(InputError, match=said):
            call()
