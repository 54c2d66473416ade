"""hs.score equals the slow version, and nothing that should not matter changes it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headscope as hs
from headscope.errors import InputError, UnsupportedModelError
from headscope.models.bridge.model import bridge_over, wrap_bridge
from headscope.models.hf.passes import HFLayerView
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.scorer import REPEATED
from headscope.scorers import CATALOGUE, Scorer
from headscope.views import AttentionRows
from tests.models.families import VOCAB, build, fresh
from tests.scoring.slow import SLOW, eager_patterns, slow_scores

TOLERANCE = 2e-6  # fp32 softmax of scores up to a few hundred


def few_tokens(batch: int = 5, length: int = 17, vocabulary: int = 9) -> torch.Tensor:
    """Tokens with many repetitions, and runs of one token."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 3 + vocabulary, (batch, length), generator=generator)


def table(model: HeadModel, probe: Probe, **options: object) -> np.ndarray:
    scored = hs.score(model, probe, NAMES, progress=False, **options)
    return np.stack([scored[name].per_example for name in NAMES])


NAMES = [name for name, scorer in CATALOGUE.items() if scorer.probe == REPEATED]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "gpt_neox"])
@pytest.mark.parametrize("name", SLOW)
def test_equal_to_the_slow_version(family: str, name: str) -> None:
    module, tokens = fresh(family), few_tokens()
    model = hs.load(module)
    scored = hs.score(model, hs.probes.from_tokens(tokens), [name], progress=False)
    expected = slow_scores(eager_patterns(module, tokens), tokens, name, model.shape.windows)
    np.testing.assert_allclose(scored[name].per_example, expected, atol=20 * TOLERANCE)


@pytest.fixture(scope="module")
def llama() -> HeadModel:
    return hs.load(build("llama"))


@pytest.fixture(scope="module")
def repeated(llama: HeadModel) -> tuple[hs.Probe, np.ndarray]:
    """A probe, and what it gives in one piece."""
    probe = hs.probes.repeated_tokens(llama, length=6, batch=5, seed=1)
    return probe, table(llama, probe)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch_size=st.integers(1, 6), memory=st.sampled_from([1, 2000, 30_000, 10**9]))
def test_batch_and_chunk_size_change_nothing(
    llama: HeadModel, repeated: tuple[hs.Probe, np.ndarray], batch_size: int, memory: int
) -> None:
    probe, whole = repeated
    parts = table(llama, probe, batch_size=batch_size, memory=memory)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def mistral() -> tuple[HeadModel, np.ndarray]:
    """A model, and its scores of a few tokens in their first order."""
    model = hs.load(build("mistral"), check=False)
    return model, table(model, hs.probes.from_tokens(few_tokens()))


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(5)))
def test_example_order_changes_nothing(
    mistral: tuple[HeadModel, np.ndarray], order: list[int]
) -> None:
    model, whole = mistral
    mixed = table(model, hs.probes.from_tokens(few_tokens()[order]))
    np.testing.assert_allclose(mixed, whole[..., order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    model = hs.load(build(family), check=False)
    tokens = few_tokens(batch=3, length=14)
    real = torch.ones(3, 18, dtype=torch.bool)
    padded = torch.zeros(3, 18, dtype=torch.long)
    where = slice(4, 18) if side == "left" else slice(0, 14)
    real[:] = False
    real[:, where] = True
    padded[:, where] = tokens
    chosen = [name for name in NAMES if not set(CATALOGUE[name].needs) & set(model.limits)]
    plain = hs.score(model, hs.probes.from_tokens(tokens), chosen, progress=False)
    other = hs.score(model, hs.probes.from_tokens(padded, real), chosen, progress=False)
    for name in chosen:
        np.testing.assert_allclose(
            other[name].per_example, plain[name].per_example, rtol=2e-4, atol=2e-5, err_msg=name
        )


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_both_paths_agree(family: str) -> None:
    module = build(family)
    probe = hs.probes.from_tokens(few_tokens())
    fast = hs.load(module, check=False)
    slow = wrap_bridge(bridge_over(module), name=family)
    assert (fast.path, slow.path) == ("hf", "bridge")
    np.testing.assert_allclose(table(slow, probe), table(fast, probe), rtol=1e-4, atol=2e-5)


def test_half_precision_is_near() -> None:
    module = fresh("llama")
    probe = hs.probes.from_tokens(few_tokens())
    names = ["previous_token", "entropy"]
    exact = hs.score(hs.load(module), probe, names, progress=False)
    half = hs.score(hs.load(module.to(torch.bfloat16)), probe, names, progress=False)
    # bf16 keeps 8 bits: scores near 50 move by 0.2, so that single probabilities may move by
    # tenths, means over queries by hundredths.
    for name in names:
        assert np.median(np.abs(half[name].mean - exact[name].mean)) < 0.05
        assert half[name].mean.dtype == np.float64


def test_flat_control_is_one_over_visible() -> None:
    model = hs.load(build("mistral"), check=False)
    window = model.shape.windows[0]
    probe = hs.probes.from_tokens(few_tokens(batch=2, length=12))
    null = hs.score(model, probe, ["previous_token"], progress=False)["previous_token"].null
    expected = np.mean([1 / min(i + 1, window) for i in range(1, 12)])
    np.testing.assert_allclose(null, expected, rtol=1e-6)


def test_a_target_outside_the_window_is_missing_not_zero() -> None:
    model = hs.load(build("mistral"), check=False)
    probe = hs.probes.repeated_tokens(model, length=8, batch=2, seed=0)
    scores = hs.score(model, probe, ["induction"], progress=False)["induction"]
    assert np.isnan(scores.mean).all()
    assert (scores.missing == 2 * 8).all()


def test_scores_of_a_windowed_model_are_those_of_its_whole_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every scorer of rows gives the same on the keys of the window and on all keys."""
    model = hs.load(build("mistral"), check=False)
    probe = hs.probes.from_tokens(few_tokens(length=40))
    probes = (REPEATED, CATALOGUE["entropy"].probe)
    names = [n for n, s in CATALOGUE.items() if s.kind == "row" and s.probe in probes]
    names = [n for n in names if "bidirectional" not in CATALOGUE[n].needs]
    seen: list[AttentionRows] = []
    true = HFLayerView.rows

    def whole(self: HFLayerView, query_pos: torch.Tensor) -> AttentionRows:
        rows = true(self, query_pos)
        return AttentionRows(rows.layer, rows.query_pos, rows.pattern, rows.visible, rows.mask)

    def watched(self: HFLayerView, query_pos: torch.Tensor) -> AttentionRows:
        seen.append(true(self, query_pos))
        return seen[-1]

    def measured(read: Any, chosen: list[Any]) -> np.ndarray:
        monkeypatch.setattr(HFLayerView, "rows", read)
        scored = hs.score(model, probe, chosen, progress=False, memory="30KB", batch_size=2)
        return np.stack([scored[name].per_example for name in scored])

    assert len(names) > 20
    np.testing.assert_allclose(measured(watched, names), measured(whole, names), atol=3e-6)

    @hs.row_scorer()
    def loudest(rows: AttentionRows, probe: Probe) -> torch.Tensor:
        """Position of the largest weight, of whole patterns."""
        return rows.pattern.argmax(-1).float()

    # Chunks are fewer where every scorer does with the keys of the window.
    chunks = {}
    for whole_ones, chosen in ((True, [loudest, "entropy"]), (False, ["entropy"])):
        seen.clear()
        measured(watched, chosen)
        late = [rows for rows in seen if rows.first_key]
        assert all(rows.is_whole == whole_ones for rows in late)
        chunks[whole_ones] = len(late)
    assert chunks[False] < 0.7 * chunks[True]


def test_a_user_scorer_needs_three_lines(llama: HeadModel) -> None:
    @hs.row_scorer()
    def three_back(rows: AttentionRows, probe: Probe) -> torch.Tensor:
        """Attention to the token three back."""
        return rows.at((rows.query_pos - 3).expand(len(probe), -1))

    assert isinstance(three_back, Scorer)
    tokens = few_tokens()
    scored = hs.score(llama, hs.probes.from_tokens(tokens), three_back, progress=False)
    # the model is shared: patterns come from a copy
    pattern = torch.stack(eager_patterns(fresh("llama"), tokens))
    expected = pattern.diagonal(-3, dim1=-2, dim2=-1).mean(-1).permute(0, 2, 1)
    np.testing.assert_allclose(scored["three_back"].per_example, expected, atol=TOLERANCE * 20)


def test_direct_logit_attribution_sums_to_the_attention_part(
    llama: HeadModel,
) -> None:
    """Heads of a layer together = what the output projection adds along the target's direction."""
    module, tokens = fresh("llama"), few_tokens()
    model = hs.load(module)
    writes, final = {}, []
    for n, block in enumerate(module.model.layers):
        projection = block.self_attn.o_proj
        projection.register_forward_hook(
            lambda m, _a, out, n=n: writes.__setitem__(n, out - (0 if m.bias is None else m.bias))
        )
    module.model.norm.register_forward_pre_hook(lambda _m, args: final.append(args[0]))
    with torch.no_grad():
        module(tokens)
    gain, unembed = module.model.norm.weight, module.lm_head.weight
    scale = (final[0].square().mean(-1) + module.model.norm.variance_epsilon).sqrt()
    direction = (unembed[tokens[:, 1:]] - unembed.mean(0)) * gain  # above the average logit
    expected = torch.stack(
        [(writes[n][:, :-1] * direction).sum(-1) / scale[:, :-1] for n in range(3)]
    )
    probe = hs.probes.from_tokens(tokens)
    name = "direct_logit_attribution"
    scored = hs.score(model, probe, [name], progress=False)[name]
    queries = (CATALOGUE[name].queries(probe) & probe.real)[:, :-1]
    wanted = torch.stack(
        [(expected[n] * queries).sum(1) / queries.sum(1) for n in range(3)]
    ).detach()
    np.testing.assert_allclose(scored.per_example.sum(1), wanted, rtol=1e-4, atol=1e-4)


def test_norm_after_attention_is_refused_to_scorers_that_need_the_bare_product() -> None:
    @hs.output_scorer(unit="length")
    def own(outputs: Any, probe: Any) -> Any:
        """Length of z @ W_O."""
        return torch.einsum("bqhd,hdm->bhqm", outputs.z, outputs.W_O).norm(dim=-1)

    model = hs.load(build("gemma2"), check=False)
    probe = hs.probes.from_tokens(few_tokens())
    with pytest.raises(UnsupportedModelError, match="norm after attention"):
        hs.score(model, probe, own)
    by_default = hs.score(model, probe, progress=False)
    assert "direct_logit_attribution" in by_default
    assert "induction" in by_default


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"scorers": ["inducton"]}, "did you mean 'induction'"),
        ({"scorers": []}, "no scorers"),
        ({"scorers": ["entropy", "entropy"]}, "entropy"),
        ({"memory": "lots"}, "'lots' is not an amount"),
    ],
)
def test_mistakes_are_told_before_any_pass(
    llama: HeadModel,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, object],
    sentence: str,
) -> None:
    monkeypatch.setattr(type(llama), "run", lambda *_a, **_k: pytest.fail("a pass was run"))
    with pytest.raises(InputError, match=sentence):
        hs.score(llama, hs.probes.from_tokens(few_tokens()), **arguments)


def test_a_probe_that_does_not_fit_is_told(llama: HeadModel) -> None:
    with pytest.raises(InputError, match="at most 128"):
        hs.score(llama, hs.probes.from_tokens(torch.ones(1, 200, dtype=torch.long)))
    with pytest.raises(InputError, match=f"knows 0 to {VOCAB - 1}"):
        hs.score(llama, hs.probes.from_tokens(torch.full((1, 8), VOCAB)))


def test_tokens_per_chunk_bound_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hs.load(build("llama"), check=False)
    probe = hs.probes.from_tokens(few_tokens(batch=4, length=14))
    held: list[int] = []
    rows = HFLayerView.rows

    def watched(self: HFLayerView, query_pos: torch.Tensor) -> AttentionRows:
        held.append(len(query_pos) * self.call.query.shape[0])
        return rows(self, query_pos)

    monkeypatch.setattr(HFLayerView, "rows", watched)
    expected = hs.score(model, probe, "entropy", progress=False)["entropy"].per_example
    whole = max(held)
    assert whole == 4 * 13
    for tokens, most in ((20, 20), (9, 8), (3, 4), (1000, whole)):
        held.clear()
        found = hs.score(
            model, probe, "entropy", max_tokens_per_chunk=tokens, memory="1GB", progress=False
        )
        assert max(held) == most
        np.testing.assert_allclose(found["entropy"].per_example, expected, rtol=1e-5)
    with pytest.raises(InputError, match="give 1 or more"):
        hs.score(model, probe, "entropy", max_tokens_per_chunk=0)


def test_a_control_may_have_another_length() -> None:
    probe = hs.probes.from_tokens(few_tokens())
    longer = replace(hs.probes.from_tokens(few_tokens(length=19)), paired=True)
    model = hs.load(fresh("llama"))
    scored = hs.score(model, replace(probe, control=longer), ["entropy"], progress=False)
    assert np.isfinite(scored["entropy"].mean).all()


def test_defaults_leave_out_what_the_callers_probe_has_no_marks_for() -> None:
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=8, batch=2)
    table = hs.score(model, probe)
    assert "induction" in table
    assert "delimiter" not in table
    with pytest.raises(InputError, match="no mark 'delimiter'"):
        hs.score(model, probe, ["induction", "delimiter"])
