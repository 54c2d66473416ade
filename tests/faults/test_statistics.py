"""What a p-value, an error and an interval of a score promise, from the probe to the result."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from scipy import stats
from torch import Tensor

import headscope as hs
from headscope.base.statistics import Design
from headscope.errors import InputError
from headscope.probes import Needle
from headscope.scorers import CATALOGUE
from headscope.views import AttentionRows
from tests.ablation.helpers import model_of, probe_of
from tests.faults.test_research_retrieval import tiny
from tests.probes.support import reader

FIXED = [
    Needle((f"The {thing} of Anna is {value}.",), f"What is the {thing} of Anna?", value, (value,))
    for thing, value in (("colour", "red"), ("number", "seven"), ("river", "long"))
]


def visible(real: Tensor) -> Tensor:
    """Causal order and padding."""
    length = real.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]


def scored(probe: hs.Probe, scorer: hs.scorers.Scorer, pattern: Tensor) -> np.ndarray:
    """Mean of a scorer over the queries of every example, for one head's attention."""
    rows = AttentionRows(0, torch.arange(probe.length), pattern[:, None], visible(probe.real))
    values = scorer(rows, probe)[:, 0]
    chosen = scorer.queries(probe) & probe.real & ~values.isnan()
    return ((values.nan_to_num(0) * chosen).sum(1) / chosen.sum(1)).numpy()


def attending(probe: hs.Probe, logits: Float[Tensor, "batch query key"]) -> Tensor:
    """Softmax over the visible keys."""
    seen = visible(probe.real)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)


def of_content(probe: hs.Probe, table: Tensor) -> Tensor:
    """A head that knows tokens and no places: ``table[token of query, token of key]``."""
    tokens = probe.tokens.clamp_max(len(table) - 1)
    return attending(probe, table[tokens[:, :, None], tokens[:, None, :]])


def of_places(probe: hs.Probe, back: int) -> Tensor:
    """A head that looks a fixed distance back."""
    place = torch.arange(probe.length)
    far = (place[:, None] - place[None] == back).float() * 50
    return attending(probe, far.expand(len(probe), -1, -1))


def named(probe: hs.Probe, scorer: hs.scorers.Scorer, patterns: Any) -> hs.HeadScores:
    """The score of heads whose attention is given as a function of the probe."""
    return all_named(probe, [scorer], patterns)[0]


def all_named(
    probe: hs.Probe, scorers: Sequence[hs.scorers.Scorer], patterns: Any
) -> list[hs.HeadScores]:
    """Several scores of these heads; the attention of each head is computed once."""
    control = probe.control
    assert control is not None
    values, null = (
        np.stack([[scored(one, scorer, rows) for scorer in scorers] for rows in made], axis=1)
        for one in (probe, control)
        for made in [(head(one) for head in patterns)]
    )
    return [
        hs.HeadScores.from_examples(
            scorer.name,
            values[number][None],
            kv_heads=1,
            control_per_example=null[number][None],
            design=Design(paired=control.paired, clusters=probe.cluster_labels),
            bounds=scorer.bounds,
            threshold=scorer.threshold,
        )
        for number, scorer in enumerate(scorers)
    ]


@pytest.mark.parametrize("control", ["removed", "other_question"])
@pytest.mark.parametrize("needles", ["facts", "numbers", "hops"])
def test_c1_a_head_that_looks_at_a_place_is_no_retrieval_head(needles: str, control: Any) -> None:
    model = reader(n_ctx=None)
    probe = hs.probes.needle(
        model, 160, [0.0, 0.5, 1.0], needles, per_cell=12, distractors=1, control=control
    )
    back = [*range(2, 90, 2)]
    heads = [lambda one, n=n: of_places(one, n) for n in back]
    names = ("retrieval", "needle_mass", "retrieval_needle_only", "retrieval_first_token")
    for found in all_named(probe, [CATALOGUE[name] for name in names], heads):
        if found.name == "needle_mass":
            assert found.mean.max() > 0.1
        assert not found.significant().any()
        assert (found.p_value < 0.05).mean() <= 0.12  # 44 heads, 5%


def test_c1_chance_hits_the_answer_in_the_control_too() -> None:
    """Attention at random: as many hits in the control as in the probe, and not none."""
    model = reader(n_ctx=None)
    generator = torch.Generator().manual_seed(0)
    probe = hs.probes.needle(model, 120, [0.2, 0.6, 1.0], "facts", per_cell=60, distractors=1)

    def head(one: hs.Probe) -> Tensor:
        return attending(one, 9 * torch.randn(len(one), *[one.length] * 2, generator=generator))

    found = named(probe, CATALOGUE["retrieval"], [head] * 8)
    assert found.null.mean() == pytest.approx(found.mean.mean(), abs=0.006)
    assert found.null.mean() > 0.002


def test_c1_a_head_that_retrieves_is_still_named() -> None:
    model = reader(n_ctx=None)
    for control in ("removed", "other_question"):
        probe = hs.probes.needle(model, 160, 5, "facts", per_cell=6, control=control)

        def looks(one: hs.Probe) -> Tensor:
            """Looks at what stands after the question's words in the text; else at the start."""
            logits = torch.zeros(len(one), one.length, one.length)
            for row in range(len(one)):
                asked = one.tokens[row][one.mark("question")[row]].tolist()
                text = one.tokens[row].tolist()
                end = int(one.mark("end")[row].int().argmax())
                last = end - len(asked)
                at = [i for i in range(last) if text[i + 1 : i + len(asked)] == asked[1:]]
                for step in range(one.length - end if at else 0):
                    logits[row, end + step, at[0] + len(asked) + step] = 50
            return attending(one, logits)

        found = named(probe, CATALOGUE["retrieval"], [looks, *[lambda one: of_places(one, 5)] * 40])
        assert found.mean[0, 0] > 0.9
        assert found.significant()[0].tolist() == [True, *[False] * 40]


def test_c1_what_continues_a_number_is_told_from_what_finds_it() -> None:
    """Behind its first digit a number goes on by itself, whatever was asked."""
    model = reader(n_ctx=None)
    probe = hs.probes.needle(model, 300, 5, "numbers", per_cell=4, control="other_question")

    def looks(one: hs.Probe, finds: bool) -> Tensor:
        """Continues the needle's number behind a digit of it; at its start only if asked for."""
        logits = torch.zeros(len(one), one.length, one.length)
        for row in range(len(one)):
            number = one.mark("needle_answer")[row].nonzero().flatten().tolist()
            steps = one.mark("answering")[row].nonzero().flatten().tolist()
            for step, (query, key) in enumerate(zip(steps, number, strict=False)):
                if step or (finds and asked_in_text(model, one, row)):
                    logits[row, query, key] = 50
        return attending(one, logits)

    heads = [lambda one, f=f: looks(one, f) for f in (True, False)]
    heads += [lambda one, n=n: of_places(one, n) for n in range(2, 42)]
    whole = named(probe, CATALOGUE["retrieval"], heads)
    first = named(probe, CATALOGUE["retrieval_first_token"], heads)
    assert whole.mean[0, 0] > 0.9
    assert whole.null[0, 0] > 0.6
    assert whole.mean[0, 1] == pytest.approx(whole.null[0, 1])
    assert (first.mean[0, 0], first.null[0, 0]) == (1.0, 0.0)
    assert first.significant()[0].tolist() == [True, *[False] * 41]


def asked_in_text(model: Any, one: hs.Probe, row: int) -> bool:
    """Whether the name that the question asks about stands in the text before it."""
    question = one.mark("question")[row]
    name = model.tokenizer.decode(one.tokens[row][question]).split()[-1].rstrip("?")
    return name in model.tokenizer.decode(one.tokens[row][: int(question.int().argmax())])


def test_c2_controls_say_that_they_are_paired() -> None:
    model = tiny(chat=False)
    for probe in (
        hs.probes.repeated_tokens(model, length=10, batch=4),
        hs.probes.text(model, ["One two three four.", "Five six seven."]),
        hs.probes.needle(model, 160, 2, per_cell=1),
    ):
        assert probe.control is not None
        assert probe.control.paired
        assert not probe.paired
    probe = hs.probes.repeated_tokens(model, length=10, batch=6)
    for name, paired in (("induction", True), ("previous_token", True)):
        scores = hs.score(model, probe, name)[name]
        assert scores.design.paired is paired
        apart = scores.per_example - scores.control_per_example
        t = stats.ttest_1samp(apart, 0, axis=-1, alternative="greater").pvalue
        np.testing.assert_allclose(scores.p_value, t, rtol=1e-6)
    other = hs.probes.random_tokens(model, length=20, batch=6, seed=5)
    assert probe.control is not None
    mine = replace(probe, control=replace(probe.control, tokens=other.tokens, paired=False))
    scores = hs.score(model, mine, "induction")["induction"]
    welch = stats.ttest_ind(
        scores.per_example,
        scores.control_per_example,
        axis=-1,
        equal_var=False,
        alternative="greater",
    )
    np.testing.assert_allclose(scores.p_value, welch.pvalue, rtol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_c3_two_equal_values_prove_nothing(n: int) -> None:
    rng = np.random.default_rng(n)
    hits, misses = ((rng.random((8, 128, n)) < 0.25).astype(float) for _ in range(2))
    for null, design in ((np.full((8, 128, 1), 0.25), None), (misses, Design(paired=True))):
        scores = hs.HeadScores.from_examples(
            "hits", hits, kv_heads=1, control_per_example=null, design=design, bounds=(0.0, 1.0)
        )
        assert not scores.significant().any()
        assert np.nan_to_num(scores.p_value, nan=1.0).min() > 0.003
        assert scores.examples_needed() == 15


def test_c4_needles_of_a_fixed_set_are_clusters() -> None:
    model = tiny(chat=False)
    probe = hs.probes.needle(model, 120, 4, FIXED, distractors=0)
    assert probe.cluster_labels == (0, 1, 2) * 4
    scores = hs.score(model, probe, "needle_mass")["needle_mass"]
    assert scores.n.max() == 12
    means = scores.per_example.reshape(*scores.mean.shape, 4, 3).mean(2)
    np.testing.assert_allclose(scores.sem, stats.sem(means, axis=-1), rtol=1e-9)
    effects = hs.ablate_heads(model, probe, hs.metrics.loss, "zero", heads="L0H1")
    means = effects.per_example[0, 1].reshape(4, 3).mean(0)
    assert effects.sem[0, 1] == pytest.approx(stats.sem(means))
    assert effects.p_value[0, 1] == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    groups = hs.ablate_groups(model, probe, hs.metrics.loss, {"one": ["L0H1"]})
    assert groups.clusters == probe.cluster_labels
    assert hs.probes.needle(model, 120, 4, "facts", distractors=0).clusters is None


def test_c4_pieces_of_a_document_and_prompts_of_a_template_are_clusters() -> None:
    model = tiny(chat=False)
    long = " ".join(["The cat sat on the mat and the dog ran home."] * 3)
    probe = hs.probes.text(model, [long, long], length=20)
    assert probe.cluster_labels is not None
    assert len(set(probe.cluster_labels)) == 2 < len(probe)
    assert probe.control is not None
    assert probe.control.cluster_labels == probe.cluster_labels
    pairs = hs.probes.pairs(hs.load(), "ioi", batch=24)
    assert pairs.cluster_labels is not None
    assert len(set(pairs.cluster_labels)) <= 12
    own = hs.probes.from_tokens([[5, 6, 7], [8, 9, 5]], clusters=[3, 3])
    assert own.cluster_labels == (3, 3)
    with pytest.raises((InputError, TypeCheckError), match=r"2 labels for 1 examples|clusters"):
        hs.probes.from_tokens([[5, 6, 7]], clusters=[3, 3])


def test_c4_clusters_come_back_from_a_file(tmp_path: Any) -> None:
    values = np.random.default_rng(0).random((1, 2, 6))
    design = Design(paired=True, clusters=(0, 0, 1, 1, 2, 2))
    one = hs.HeadScores.from_examples(
        "x", values, kv_heads=1, control_per_example=values / 2, design=design
    )
    table = hs.HeadTable([one])
    for examples in (True, False):
        path = tmp_path / f"{examples}.parquet"
        table.save(path, examples=examples)
        again = hs.HeadTable.load(path)["x"]
        np.testing.assert_allclose(again.p_value, one.p_value)
        np.testing.assert_allclose(again.sem, one.sem)
        np.testing.assert_allclose(again.p_floor, one.p_floor)
        if examples:
            assert again.design == design
            np.testing.assert_allclose(again.interval(), one.interval())


def test_c5_intervals_of_a_score_cover() -> None:
    rng = np.random.default_rng(0)
    for n in (8, 16):
        for values, mean in (
            (rng.normal(size=(40, 100, n)), 0.0),
            (rng.beta(1, 9, (40, 100, n)), 0.1),
        ):
            bounds = (0.0, 1.0) if mean else (None, None)
            low, high = hs.HeadScores.from_examples(
                "x", values, kv_heads=1, bounds=bounds
            ).interval()
            assert ((low < mean) & (mean < high)).mean() > 0.935
    grid = hs.ablate_groups(
        model_of("llama"), probe_of(), hs.metrics.loss, {"one": ["L0H1"]}, "zero"
    )
    low, high = grid.interval()
    t = stats.ttest_1samp(grid.per_example[0], 0).confidence_interval()
    assert low[0] <= t.low + 1e-9
    assert high[0] >= t.high - 1e-9


def test_c6_what_has_no_slope_at_the_clean_run_is_not_estimated_there() -> None:
    model, probe = model_of("llama"), probe_of()
    divergence = hs.metrics.kl_divergence
    with pytest.raises(InputError, match="gradient there is 0"):
        estimated(model, probe, divergence)
    with pytest.raises(InputError, match="gradient there is 0"):
        hs.pruning.gradient_importance(model, probe, divergence)
    found = estimated(model, probe, divergence, steps=32)
    gap = found.provenance.checks["completeness"]
    assert abs(gap["gap"]) < 0.05 * gap["effect"]


def test_c7_integrated_gradients_to_zero_need_a_way_there() -> None:
    probe = probe_of()
    for family in ("gemma2", "olmo2"):
        with pytest.raises(InputError, match="norm after attention"):
            estimated(model_of(family), probe, hs.metrics.loss, baseline="zero", steps=8)
        assert estimated(model_of(family), probe, hs.metrics.loss, steps=8).mean.any()
    found = estimated(model_of("llama"), probe, hs.metrics.loss, baseline="zero", steps=64)
    checks = found.provenance.checks["completeness"]
    assert checks["sum"] == pytest.approx(np.nanmean(found.per_example.sum((0, 1))))
    assert checks["gap"] == pytest.approx(checks["sum"] - checks["effect"])
    assert abs(checks["gap"]) < 0.1 * abs(checks["effect"])


def estimated(model: Any, probe: hs.Probe, metric: Any, **options: Any) -> hs.HeadScores:
    return hs.estimate_heads(model, probe, metric, **options)


@pytest.mark.parametrize("name", ["induction", "induction_no_sink"])
def test_c8_heads_of_content_or_of_place_score_in_the_control_what_they_score(name: str) -> None:
    model = reader()
    probe = hs.probes.repeated_tokens(model, length=30, batch=100, seed=1)
    generator = torch.Generator().manual_seed(0)
    size = int(probe.tokens.max()) + 1
    salience = [torch.randn(size, generator=generator) for _ in range(20)]
    bilinear = [torch.randn(size, size, generator=generator) for _ in range(20)]
    for strength in (1.0, 4.0):
        tables = [*(strength * one.expand(size, -1) for one in salience)]
        tables += [strength * one for one in bilinear]
        heads: list[Any] = [lambda one, t=t: of_content(one, t) for t in tables]
        heads += [lambda one, n=n: of_places(one, n) for n in (28, 29, 30, 31)]
        found = named(probe, CATALOGUE["induction"], heads)
        assert found.design.paired
        assert (np.nan_to_num(found.p_value, nan=1) < 0.05).mean() < 0.14  # 44 heads, 5%
        assert (found.p_adjusted < 0.05).mean() <= 0.05
    place = named(probe, CATALOGUE["induction"], [lambda one: of_places(one, 29)])
    assert place.mean[0, 0] == pytest.approx(place.null[0, 0]) == pytest.approx(1)

    def induces(one: hs.Probe) -> Tensor:
        same = one.tokens[:, :, None] == one.tokens[:, None, :].roll(1, 2)
        return attending(one, same.float() * 50)

    real = named(probe, CATALOGUE["induction"], [induces])
    assert real.mean[0, 0] > 0.9
    assert real.null[0, 0] < 0.1
    assert real.significant().all()


def test_c9_scores_with_a_sign_are_tested_both_ways() -> None:
    for scorer in CATALOGUE.values():
        low, high = scorer.bounds
        signed = (low is None or low < 0) and (high is None or high > 0)
        assert scorer.alternative == ("two-sided" if signed else "greater"), scorer.name
    assert CATALOGUE["direct_logit_attribution"].alternative == "two-sided"

    @hs.output_scorer(unit="logits", needs=())
    def mine(outputs: Any, probe: hs.Probe) -> Tensor:
        """Minus the size of what a head gives."""
        return -outputs.z.norm(dim=-1).transpose(1, 2)

    assert mine.alternative == "two-sided"


def test_c10_even_rows_sum_to_one_where_the_models_own_do_not() -> None:
    model, probe = model_of("gpt_oss"), probe_of()
    seen: list[AttentionRows] = []
    model.run(probe, reads={hs.Tap("pattern", 0): lambda view: seen.append(view.rows(slice(None)))})
    (rows,) = seen
    assert bool((rows.total < 1 - 1e-6).any()), "a learned sink takes its share"
    even = rows.uniform().total
    torch.testing.assert_close(even, torch.ones_like(even))


def test_c10_a_query_of_zero_leaves_what_a_learned_sink_takes() -> None:
    model, probe = model_of("gpt_oss"), probe_of()
    seen: list[AttentionRows] = []
    model.run(
        probe,
        reads={hs.Tap("pattern", 0): lambda view: seen.append(view.rows(slice(None)))},
        writes={hs.Tap("query", 0): lambda query, _span: query * 0},
    )
    shown = seen[0].visible[:, None] & (seen[0].pattern > 0)
    for row, keys in zip(seen[0].pattern[0, 0], shown[0, 0], strict=True):
        values = row[keys]
        torch.testing.assert_close(values, values[:1].expand_as(values))  # even
        assert float(values.sum()) < 1.0  # but for the sink


def test_c11_the_control_draws_as_its_probe_does() -> None:
    model = reader()
    model = replace(model, shape=replace(model.shape, n_ctx=None))
    length = 400  # more than half of the vocabulary: two different copies would not fit
    probe = hs.probes.repeated_tokens(model, length=length, batch=2)
    assert probe.control is not None
    assert not probe.settings["replacement"]
    for row in probe.control.tokens[:, 1:].unflatten(1, (2, length)).flatten(0, 1).tolist():
        assert len(set(row)) == length


def test_c11_copying_counts_a_tenth_of_the_ranks() -> None:
    model = hs.load()
    pairs = {"copy": hs.circuits.relations(model)["copy"]}
    for k, expected in ((10, "k=1"), (25, "k=3")):
        table = hs.circuits.relation_scores(model, pairs, k)
        assert table["maps_copy"].source.endswith(expected)


def test_e11_two_examples_have_a_wide_interval() -> None:
    values = np.array([[[0.2, 0.4], [0.1, 0.5]]])
    low, high = hs.HeadScores.from_examples("x", values, kv_heads=1).interval()
    t = stats.t.ppf(0.975, 1) * np.abs(np.diff(values))[..., 0] / 2
    np.testing.assert_allclose(high - low, 2 * t)
