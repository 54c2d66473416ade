"""Attention with exact zeros: entmax and top-k against slow versions, and scorers on their rows."""

import math

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.edits import entmax_rows, top_rows
from headscope.errors import InputError
from headscope.scorers import CATALOGUE
from headscope.views import AttentionRows
from tests.models import families


def sparsemax(scores: torch.Tensor) -> torch.Tensor:
    """Martins and Astudillo 2016, algorithm 1, of one row."""
    ordered = scores.sort(descending=True).values
    k = torch.arange(1, len(scores) + 1)
    support = int((1 + k * ordered > ordered.cumsum(0)).sum())
    tau = (ordered[:support].sum() - 1) / support
    return (scores - tau).clamp_min(0)


def entmax15(scores: torch.Tensor) -> torch.Tensor:
    """Peters et al. 2019, algorithm 2, of one row."""
    half = (scores - scores.max()) / 2
    ordered = half.sort(descending=True).values
    for size in range(len(scores), 0, -1):
        top = ordered[:size]
        mean, square = top.mean(), (top**2).mean()
        rest = (1 - size * (square - mean**2)) / size
        tau = mean - rest.clamp_min(0).sqrt()
        if rest >= 0 and ordered[size - 1] >= tau:
            return (half - tau).clamp_min(0) ** 2
    raise AssertionError


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("alpha", "exact"), [(2.0, sparsemax), (1.5, entmax15)])
def test_entmax_is_what_sorting_gives(seed: int, alpha: float, exact: object) -> None:
    assert callable(exact)
    scores = 3 * torch.randn(11, generator=torch.Generator().manual_seed(seed))
    found = entmax_rows(scores.softmax(-1), torch.tensor([alpha]))
    expected = exact(scores)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    clearly = (expected == 0) & (expected.sum() > 0)
    assert bool((found[clearly] == 0).all())
    assert bool(clearly.any())


def test_entmax_goes_from_softmax_to_the_largest() -> None:
    scores = torch.tensor([1.0, 0.4, -0.3, 0.9])
    soft = scores.softmax(-1)
    torch.testing.assert_close(entmax_rows(soft, torch.tensor([1.01])), soft, atol=0.02, rtol=0)
    assert entmax_rows(soft, torch.tensor([1.0])) is soft
    hard = entmax_rows(soft, torch.tensor([50.0]))
    assert int(hard.argmax()) == 0
    counts = [
        int((entmax_rows((3 * scores).softmax(-1), torch.tensor([a])) > 0).sum())
        for a in (1.2, 1.5, 2.0, 4.0)
    ]
    assert counts == sorted(counts, reverse=True)


def test_gradients_of_scores_and_alpha() -> None:
    scores = torch.tensor([[0.3, -0.2, 0.9, -4.0], [0.0, 0.1, 0.2, 0.3]], dtype=torch.float64)
    scores.requires_grad_()
    alpha = torch.tensor([[1.4], [1.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, a: entmax_rows(s.softmax(-1), a), (scores, alpha), eps=1e-5, atol=1e-4
    )


def test_a_sink_takes_part_in_sparse_rows() -> None:
    scores, sink = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.8])
    soft = torch.cat([scores, sink]).softmax(-1)
    expected = sparsemax(torch.cat([scores, sink]))[:-1]
    found = entmax_rows(soft[:-1], torch.tensor([2.0]))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    chosen = torch.cat([scores[:2], sink]).softmax(-1)[:2]
    torch.testing.assert_close(top_rows(soft[:-1], 2)[:2], chosen)
    assert float(top_rows(soft[:-1], 2)[2]) == 0


def test_top_k_is_the_softmax_of_the_largest() -> None:
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for k in (1, 3, 9, 20):
        found = top_rows(scores.softmax(-1), k)
        for row, mine in zip(scores, found, strict=True):
            best = sorted(range(9), key=lambda j: -float(row[j]))[:k]
            total = sum(math.exp(float(row[j])) for j in best)
            for j in range(9):
                expected = math.exp(float(row[j])) / total if j in best else 0.0
                assert float(mine[j]) == pytest.approx(expected, abs=1e-6)
    assert top_rows(torch.full((4,), 0.25), 1).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss"])
@pytest.mark.parametrize("sparse", [hs.interventions.Entmax(1.5), hs.interventions.TopK(2)])
def test_a_model_attends_that_way_in_a_scope(
    family: str, sparse: hs.interventions.Entmax | hs.interventions.TopK
) -> None:
    model = hs.load(families.build(family))
    probe = hs.probes.repeated_tokens(model, length=8, batch=2)
    plain = hs.capture.collect(model, probe)
    with sparse.on(model, heads="L0H1"):
        seen = hs.capture.collect(model, probe, layers=[0])[0]
    rows = plain[0].pattern
    alpha = torch.tensor([1.5])
    made = entmax_rows(rows, alpha) if sparse.name == "entmax" else top_rows(rows, 2)
    torch.testing.assert_close(seen.pattern[:, 1], made[:, 1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen.pattern[:, 0], rows[:, 0], atol=1e-6, rtol=1e-5)
    values = plain[0].z  # what the edited rows average
    assert not torch.allclose(seen.z[:, :, 1], values[:, :, 1])
    again = hs.capture.collect(model, probe, layers=[0])[0].pattern
    assert torch.equal(again, rows)


def test_the_scope_is_seen_by_the_models_own_passes() -> None:
    model = hs.load(families.build("llama"))
    tokens = torch.randint(3, families.VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    plain = model.module(tokens).logits
    with hs.interventions.TopK(1).on(model):
        sparse = model.module(tokens).logits
        torch.testing.assert_close(model.forward(tokens), sparse, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, sparse)
    with hs.interventions.TopK(50).on(model):
        torch.testing.assert_close(model.module(tokens).logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "sparse", [hs.interventions.Entmax(1.5), hs.interventions.TopK(1)], ids=str
)
def test_no_row_scorer_needs_full_support(
    sparse: hs.interventions.Entmax | hs.interventions.TopK,
) -> None:
    model = hs.load()
    names = [
        name
        for name, scorer in CATALOGUE.items()
        if scorer.reads == "rows"
        and not any(need in model.limits for need in scorer.needs)
        and "bidirectional" not in scorer.needs
    ]
    assert len(names) > 25
    needle = hs.probes.needle(model, lengths=60, depths=2, per_cell=1)
    pairs = hs.probes.pairs(model, "ioi", batch=4)
    repeated = hs.probes.repeated_tokens(model, length=12, batch=4)
    checked = 0
    for name in names:
        for probe in (repeated, needle, pairs):
            try:
                plain = hs.score(model, probe, [name], progress=False)[name]
            except InputError:  # made for another probe
                continue
            with sparse.on(model):
                found = hs.score(model, probe, [name], progress=False)[name]
            checked += 1
            assert not np.isinf(found.per_example).any(), name
            assert np.array_equal(np.isnan(found.per_example), np.isnan(plain.per_example)), name
            low, high = found.bounds
            inside = found.per_example[~np.isnan(found.per_example)]
            assert low is None or (inside >= low - 1e-6).all(), name
            assert high is None or (inside <= high + 1e-6).all(), name
            break
    assert checked > 25


def rows_of(pattern: list[list[float]]) -> AttentionRows:
    """One query that sees all keys, in several heads."""
    made = torch.tensor(pattern)[None, :, None]
    keys = made.shape[-1]
    return AttentionRows(
        0, torch.tensor([keys - 1]), made, torch.ones(1, 1, keys, dtype=torch.bool)
    )


def test_density_diversity_and_entropy_by_hand() -> None:
    rows = rows_of([[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]])
    probe = hs.probes.from_tokens(torch.tensor([[1, 2, 3, 4]]))
    density = CATALOGUE["density"].function(rows, probe)[0, :, 0]
    assert density.tolist() == [0.25, 0.5]
    assert rows.entropy[0, :, 0].tolist() == pytest.approx([0, math.log(2)], abs=1e-6)
    apart = CATALOGUE["head_diversity"].function(rows, probe)[0, :, 0]
    assert apart.tolist() == pytest.approx([math.log(2), math.log(2)], abs=1e-6)
    same = rows_of([[0.5, 0.5, 0.0, 0.0]] * 3)
    assert CATALOGUE["head_diversity"].function(same, probe).abs().max() < 1e-6


def test_diversity_averages_to_the_divergence_of_the_layer() -> None:
    draw = torch.Generator().manual_seed(0)
    p = entmax_rows((3 * torch.randn(4, 7, generator=draw)).softmax(-1), torch.tensor([1.5]))
    rows = rows_of(p.tolist())
    probe = hs.probes.from_tokens(torch.arange(7)[None])
    found = CATALOGUE["head_diversity"].function(rows, probe)

    def entropy(row: list[float]) -> float:
        return -sum(x * math.log(x) for x in row if x > 0)

    mixed = [sum(column) / 4 for column in zip(*p.tolist(), strict=True)]
    divergence = entropy(mixed) - sum(map(entropy, p.tolist())) / 4
    assert float(found.mean()) == pytest.approx(divergence, abs=1e-5)


def test_an_alpha_per_head_is_that_heads() -> None:
    model = hs.load(families.build("gpt2"))
    tokens = torch.randint(3, families.VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    alpha = torch.full((model.shape.n_layers, model.shape.n_heads), 1.5)
    alpha[1, 2] = 2.0
    together = model.forward(tokens, edits=[hs.edits.entmax(["L0H3", "L1H2", "L1H0"], alpha)])
    apart = [hs.edits.entmax(["L0H3", "L1H0"], 1.5), hs.edits.entmax("L1H2", 2.0)]
    torch.testing.assert_close(together, model.forward(tokens, edits=apart))


def test_alphas_move_where_the_loss_wants_them() -> None:
    model = hs.load(families.build("gpt2"))
    probe = hs.probes.repeated_tokens(model, length=8, batch=4)
    found = hs.pruning.learn_alphas(model, probe, steps=12, rate=0.3, start=1.5)

    def loss(alpha: torch.Tensor) -> float:
        edit = hs.edits.entmax(model.shape.heads, alpha)
        logits = model.forward(probe.tokens, edits=[edit])
        return float(hs.metrics.loss(logits, probe).mean())

    first = torch.full(found.mean.shape, 1.5)
    assert loss(torch.tensor(found.mean).float()) < loss(first)
    assert all(not p.requires_grad or p.grad is None for p in model.module.parameters())


def test_mistakes_are_said() -> None:
    with pytest.raises(InputError, match=r"alpha=0\.5"):
        hs.interventions.Entmax(0.5)
    with pytest.raises(InputError, match="k=0"):
        hs.interventions.TopK(0)
    with pytest.raises(InputError, match=r"give hs.interventions.Entmax\(alpha\)"):
        hs.interventions.named("entmax")
    with pytest.raises(InputError, match="no value for L5H0"):
        hs.edits.entmax("L5H0", torch.full((2, 4), 1.5))
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=5, batch=2)
    with pytest.raises(InputError, match=r"start between 1\.01 and 2"):
        hs.pruning.learn_alphas(model, probe, start=2.5)
