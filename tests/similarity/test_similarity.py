"""Similarity of heads: hand cases, invariances, slow obvious versions, planted twins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.spatial.distance import jensenshannon

import headscope as hs
from headscope.errors import InputError
from headscope.table import HeadSimilarity
from tests.models.seq2seq import both_sides, module_of

LN2 = np.log(2.0)


def bert(heads: int = 4, twins: bool = False) -> Any:
    """A random encoder; with twins heads 0 and 1 of layer 0 have equal weights."""
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=32, max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    if twins:
        own, size = model.bert.encoder.layer[0].attention.self, 32 // heads
        with torch.no_grad():
            for part in (own.query, own.key, own.value):
                part.weight[size : 2 * size] = part.weight[:size]
    return hs.load(model)


def texts(examples: int = 5, length: int = 9) -> Any:
    """Random tokens, the last example padded."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 50, (examples, length), generator=draw)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[-1, length - 3 :] = False
    return hs.probes.from_tokens(ids, real=real)


def test_divergence_of_rows_by_hand_and_by_scipy() -> None:
    deltas = torch.tensor([[[1.0, 0, 0]], [[0, 1.0, 0]], [[0.5, 0.5, 0]]])
    found = hs.similarity.divergences(deltas, deltas)
    # Of a delta and the even row: H(3/4, 1/4) - ln(2) / 2.
    half = -0.75 * np.log(0.75) - 0.25 * np.log(0.25) - LN2 / 2
    expected = [[0, LN2, half], [LN2, 0, half], [half, half, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    rows = torch.rand(2, 3, 7, 5).softmax(-1)
    slow = [
        [np.mean([jensenshannon(a, b) ** 2 for a, b in zip(one, other, strict=True)])
         for other in rows[1].numpy()] for one in rows[0].numpy()
    ]  # fmt: skip
    np.testing.assert_allclose(hs.similarity.divergences(*rows), slow, atol=1e-6)


def test_cka_is_that_of_gram_matrices_and_knows_no_rotation() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 40, d, generator=draw) for d in (4, 6))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=draw)).Q
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    grams = [centre @ (one[0].double() @ one[0].double().T) @ centre for one in (x, y)]
    slow = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    assert hs.similarity.cka(x, y).item() == pytest.approx(slow.item(), abs=1e-10)
    assert hs.similarity.cka(x, 3 * (x @ turn) + 5).item() == pytest.approx(1.0, abs=1e-6)
    squeezed = x * torch.tensor([10.0, 1, 1, 1])  # not a rotation: it tells
    assert hs.similarity.cka(x, squeezed).item() < 0.9
    assert np.isnan(hs.similarity.cka(x, torch.ones(1, 40, 3)).item())


def test_pwcca_is_one_for_linear_maps_and_weighs_by_what_a_direction_carries() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 4, generator=draw)
    mixed = x @ torch.randn(4, 4, generator=draw) - 2
    assert hs.similarity.pwcca(x, mixed).item() == pytest.approx(1.0, abs=1e-6)
    # Columns u, v, w, orthonormal and centred: (3u, v) against (u, w) shares u alone. Weighted by
    # the first that is 3 / (3 + 1), by the second 1 / 2.
    base = torch.linalg.qr(torch.cat([torch.ones(50, 1), torch.randn(50, 3, generator=draw)], 1)).Q[
        :, 1:
    ]
    u, v, w = base.T
    first, second = torch.stack([3 * u, v], 1)[None], torch.stack([u, w], 1)[None]
    expected = (3 / 4 + 1 / 2) / 2
    assert hs.similarity.pwcca(first, second).item() == pytest.approx(expected, abs=1e-5)
    apart = hs.similarity.pwcca(torch.stack([u], 1)[None], torch.stack([v], 1)[None])
    assert apart.item() == pytest.approx(0.0, abs=1e-5)


def slow_rows(model: Any, probe: Any, by: str) -> list[np.ndarray]:
    """Every real row of every head, from whole patterns or products, one list entry a head."""
    acts = hs.capture.collect(model, probe)
    found = []
    for layer in range(2):
        for head in range(model.shape.n_heads):
            rows = []
            for example in range(len(probe)):
                real = probe.real[example]
                if by == "pattern":
                    pattern = acts[layer].pattern[example, head]
                else:
                    vectors = vectors_of(model, probe, layer, by)[example, head]
                    scores = vectors @ vectors.T / vectors.shape[-1] ** 0.5
                    pattern = scores.masked_fill(~real, -torch.inf).softmax(-1)
                rows.append(pattern[real].numpy())
            found.append(np.concatenate(rows))
    return found


def vectors_of(model: Any, probe: Any, layer: int, by: str) -> torch.Tensor:
    kept = []
    model.run(probe, reads={(by, layer): lambda view: kept.append(view.value.clone())})
    return kept[0].detach()


@pytest.mark.parametrize("by", ["pattern", "query", "key", "value"])
def test_rows_of_heads_as_from_whole_patterns(by: str) -> None:
    model, probe = bert(), texts()
    found = hs.similarity.heads(model, probe, by, batch_size=2)
    rows = slow_rows(model, probe, by)
    slow = [
        [np.mean([jensenshannon(p, q) ** 2 for p, q in zip(a, b, strict=True)]) for b in rows]
        for a in rows
    ]
    np.testing.assert_allclose(found.values, np.nan_to_num(slow), atol=2e-6)
    assert [str(one) for one in found.first] == [f"L{i}H{j}" for i in (0, 1) for j in range(4)]


def test_outputs_of_heads_as_from_collected_ones() -> None:
    model, probe = bert(), texts()
    acts = hs.capture.collect(model, probe)
    z = torch.cat([acts[layer].z[probe.real] for layer in (0, 1)], 1).transpose(0, 1)
    for by in ("cka", "pwcca"):
        found = hs.similarity.heads(model, probe, by, batch_size=2)
        expected = getattr(hs.similarity, by)(z, z)
        np.testing.assert_allclose(found.values, expected, atol=1e-5)


def test_twins_are_found_and_nothing_else() -> None:
    model, probe = bert(twins=True), texts()
    for by in ("pattern", "cka", "query"):
        found = hs.similarity.heads(model, probe, by, draws=19)
        (one, other, value), (_, _, second) = found.top(2)
        assert (str(one), str(other)) == ("L0H0", "L0H1")
        assert value == pytest.approx(1.0 if by == "cka" else 0.0, abs=1e-5)
        assert abs(second - value) > 0.02
        assert found.p_value[0, 1] == pytest.approx(1 / 20)


def test_out_of_order_rows_keep_their_values_and_their_padding() -> None:
    probe = texts()
    same = hs.similarity.heads(bert(twins=True), probe, "pattern", draws=3)
    # A twin whose keys are permuted is as peaked and looks elsewhere.
    assert (same.null[:, 0, 1] > 0.1).all()
    peaks = torch.tensor([[[0.7, 0.3, 0.0], [0.5, 0.5, 0.0]]])
    seen = torch.tensor([[[True, True, False], [True, True, False]]])
    moved = hs.similarity._disordered(hs.similarity._Kept(peaks, seen), 0, 0)
    torch.testing.assert_close(moved.sort(-1).values, peaks.sort(-1).values)
    assert float(moved[..., 2].abs().max()) == 0.0


def test_models_of_other_sizes_and_a_model_beside_itself() -> None:
    small, large, probe = bert(2), bert(8), texts()
    found = hs.similarity.heads(small, probe, "value", other=large)
    assert found.values.shape == (4, 16)
    assert len(found.matches()) == 4
    assert len({other for _, other, _ in found.matches()}) == 4
    inside = hs.similarity.heads(small, probe, "cka")
    beside = hs.similarity.heads(small, probe, "cka", other=bert(2))
    np.testing.assert_allclose(beside.values, inside.values, atol=1e-6)


def test_a_causal_model_leaves_out_its_first_row() -> None:
    model = hs.load("tiny-gpt2")
    probe = hs.probes.repeated_tokens(model, length=6, batch=3)
    found = hs.similarity.heads(model, probe, "pattern")
    assert found.provenance.probe["positions"] == 3 * 12
    assert str(found.top(1)[0][:2]) == "(L1H2, L1H3)"  # both look at the previous token


def test_stacks_are_compared_by_outputs() -> None:
    model = hs.load(module_of("bart"))
    probe = hs.probes.from_batch(both_sides(model))
    cross = hs.similarity.heads(model, probe, "pattern", stack="cross")
    assert str(cross.first[0]) == "X0H0"
    assert cross.values.shape == (len(cross.first),) * 2
    with pytest.raises(InputError, match="compare such heads by their outputs"):
        hs.similarity.heads(model, probe, "pattern", stack="decoder", other_stack="cross")
    both = hs.similarity.heads(model, probe, "cka", stack="decoder", other_stack="cross")
    assert str(both.second[0]) == "X0H0"
    for by in ("key", "query"):  # keys are of source positions
        assert np.isfinite(hs.similarity.heads(model, probe, by, stack="cross").values).all()


def of_distances(distances: np.ndarray) -> HeadSimilarity:
    heads = tuple(hs.HeadIndex(0, at) for at in range(len(distances)))
    values = 1 - distances
    spec = hs.similarity.SPECS["cka"]
    return HeadSimilarity(spec, values, values[None] * 0, heads, heads, ("m", "m"), within=True)


def test_map_and_clusters_by_hand(tmp_path: Path) -> None:
    places = np.array([0.0, 0.1, 0.5, 0.55, 0.6])
    result = of_distances(np.abs(places[:, None] - places))
    assert [[one.head for one in some] for some in result.clusters(2)] == [[2, 3, 4], [0, 1]]
    points = result.embed(2)
    np.testing.assert_allclose(np.abs(points[:, 0] - points[0, 0]), places, atol=1e-9)
    np.testing.assert_allclose(points[:, 1], 0, atol=1e-6)
    assert result.explained(1) == pytest.approx(1.0)
    assert sorted(result.order().tolist()) == [0, 1, 2, 3, 4]
    result.save(tmp_path / "likeness.safetensors")
    again = HeadSimilarity.load(tmp_path / "likeness.safetensors")
    np.testing.assert_array_equal(again.values, result.values)
    assert again.first == result.first
    assert again.spec == result.spec
    assert list(hs.plots.figures(result)) == ["", "_map"]
    for draw in hs.plots.figures(result).values():
        draw("dark")
    names = hs.plots.head_map(result).data[0].text
    assert sorted(name for shown in names if shown for name in shown.split(", ")) == [
        f"L0H{at}" for at in range(5)
    ]


def test_what_does_not_fit_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = bert(), texts()
    with pytest.raises(InputError, match="measure of similarity"):
        hs.similarity.heads(model, probe, "cca")
    with pytest.raises(InputError, match="give probes with the same words"):
        hs.similarity.heads(model, probe, other=bert(), other_probe=texts(5, 8))
    with pytest.raises(InputError, match="at 9 positions are always linear maps of each other"):
        hs.similarity.heads(model, texts(), "pwcca", positions=9)
    monkeypatch.setattr("headscope.similarity._MOST", 1000)
    with pytest.raises(InputError, match="fewer positions"):
        hs.similarity.heads(model, probe)
    monkeypatch.undo()
    result = hs.similarity.heads(model, probe, "cka")
    with pytest.raises(InputError, match="every head matches itself"):
        result.matches()
    with pytest.raises(InputError, match="method='best'"):
        result.linkage("best")


def test_two_models_of_one_name_and_size_stay_two() -> None:
    other = bert()
    with torch.no_grad():
        for weight in other.module.parameters():
            weight.mul_(1.5)
    model, probe = bert(), texts()
    assert model.name == other.name
    likeness = hs.similarity.heads(model, probe, other=other, draws=1)
    assert not likeness.within
    assert len(likeness.matches()) == 8
    assert likeness.pairs.all()
    assert not np.allclose(likeness.values, likeness.values.T)
    for same in ({}, {"other": model}, {"other": model, "other_probe": probe}):
        assert hs.similarity.heads(model, probe, draws=1, **same).within
    assert not hs.similarity.heads(model, probe, other_probe=texts(5), draws=1).within


def test_results_name_no_folders(tmp_path: Path) -> None:
    model = bert()
    model.module.save_pretrained(tmp_path / "mine")
    likeness = hs.similarity.heads(hs.load(tmp_path / "mine"), texts(), draws=1)
    assert likeness.models == ("mine", "mine")
    assert str(tmp_path) not in likeness.summary() + str(likeness.provenance)
