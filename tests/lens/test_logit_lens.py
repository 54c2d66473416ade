"""The logit lens: against the model itself, transformer-lens, and whatever the chunk size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from headscope import lens
from headscope.errors import InputError
from headscope.lens import reading
from headscope.models.hf.model import HFModel
from headscope.models.loading import load
from tests.handwired import handwired_gpt2
from tests.lens.helpers import EVERY, TOKENS, model_of, plain_logits
from tests.models import families

TL_FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "cohere2", "granite", "olmo2")


@pytest.mark.parametrize("family", EVERY)
def test_the_last_row_is_the_model_itself(family: str) -> None:
    grid = lens.logit_lens(model_of(family), TOKENS, k=3)
    expected = plain_logits(family)
    best = expected.topk(3)
    assert grid.rows[-1] == f"L{model_of(family).shape.n_layers - 1}"
    assert np.array_equal(grid.ids[-1], best.indices.numpy())
    scale = float(expected.abs().max())
    assert np.abs(grid.logits[-1] - best.values.numpy()).max() < 1e-5 * max(1.0, scale)
    log_probs = expected.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    assert np.abs(grid.entropy[-1] - entropy.numpy()).max() < 1e-3
    assert grid.kl[-1].max() < 1e-5
    assert not grid.target_rank[-1].any()


@pytest.mark.parametrize("family", TL_FAMILIES)
def test_equal_to_transformer_lens(family: str) -> None:
    from transformer_lens.tools.analysis import logit_lens as theirs
    from transformer_lens.tools.analysis.logit_lens import logit_readout

    model = model_of(family)
    assert isinstance(model, HFModel)
    bridge, tokens = model.bridge, torch.tensor([TOKENS])
    targets = torch.tensor([[*TOKENS[1:], 7]])
    grids = lens.logit_lenses(model, TOKENS, target=targets[0].tolist(), k=4)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        found = theirs(bridge, tokens, positions=None, top_k=4, return_type="probs").readout
        ranks = theirs(bridge, tokens, positions=None, targets=targets, return_type="log_probs")
        vectors = {
            site: torch.stack([cache[f"blocks.{n}.hook_{name}_out"][0] for n in range(3)])
            for site, name in (("attention", "attn"), ("mlp", "mlp"))
        }
    grid = grids["residual"]
    assert np.array_equal(grid.ids, found.top_ids[:, 0].numpy())
    assert np.abs(grid.probabilities - found.values[:, 0].numpy()).max() < 1e-5
    assert np.abs(grid.entropy - found.entropy[:, 0].numpy()).max() < 1e-4
    assert np.array_equal(grid.target_rank, ranks.readout.target_ranks[:, 0, :, 0].numpy())
    log_probs = ranks.readout.values[:, 0, :, 0].numpy()
    assert np.abs(grid.target_log_prob - log_probs).max() < 1e-4 * max(1, np.abs(log_probs).max())
    if family in ("gemma2", "olmo2", "granite"):
        return  # there transformer-lens shows these before the norm or multiplier that follows
    for site, value in vectors.items():
        read = logit_readout(bridge, value, top_k=4, return_type="probs")
        assert np.abs(grids[site].probabilities - read.values.numpy()).max() < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere2"])
def test_chunks_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lens.logit_lens(model_of(family), TOKENS)
    monkeypatch.setattr(reading, "_ENTRIES", 3 * families.VOCAB)
    cut = lens.logit_lens(model_of(family), TOKENS)
    assert np.array_equal(cut.ids, whole.ids)
    for name in ("logits", "kl", "entropy", "target_log_prob"):
        np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=1e-4, atol=1e-4)


def test_kl_is_that_of_the_definition() -> None:
    model = model_of("llama")
    grid = lens.logit_lens(model, TOKENS)
    stream = model.parts.layer_inputs(torch.tensor([TOKENS]), [1])[1]
    with torch.no_grad():
        early = model.unembedding.logits(stream)[0].double().log_softmax(-1)
    final = plain_logits("llama").log_softmax(-1)
    expected = (final.exp() * (final - early)).sum(-1).numpy()
    assert grid.rows[1] == "L0"  # what leaves block 0 enters block 1
    np.testing.assert_allclose(grid.kl[1], expected, rtol=1e-4, atol=1e-5)


def test_positions_and_targets() -> None:
    model = model_of("gpt2")
    whole = lens.logit_lens(model, TOKENS, target=5)
    some = lens.logit_lens(model, TOKENS, target=5, positions=[-1, 3])
    assert some.positions.tolist() == [11, 3]
    assert some.tokens == (str(TOKENS[11]), str(TOKENS[3]))
    np.testing.assert_allclose(some.kl, whole.kl[:, [11, 3]], rtol=1e-5, atol=1e-6)
    assert some.targets.tolist() == [5, 5]
    assert np.array_equal(some.target_rank, whole.target_rank[:, [11, 3]])
    frame = some.to_pandas()
    assert len(frame) == 4 * 2 * 5
    one = frame[(frame.row == "L1") & (frame.position == 3) & (frame["rank"] == 0)].iloc[0]
    assert one.id == some.ids[2, 1, 0]
    assert one.probability == some.probabilities[2, 1, 0]
    assert one.target_probability == pytest.approx(np.exp(some.target_log_prob[2, 1]))


def test_a_wired_induction_head_settles_the_answer_in_its_layer() -> None:
    model = load(handwired_gpt2().model)
    grid = lens.logit_lens(model, [3, 4, 5, 6, 3, 4, 5], positions=[4, 5, 6])
    assert grid.targets.tolist() == [4, 5, 6]
    assert (grid.target_probability[:2] < 0.1).all()
    assert (grid.target_probability[2] > 0.9).all()
    assert grid.settled()[2] == "L1"
    written = lens.logit_lens(model, [3, 4, 5, 6, 3, 4, 5], "attention", positions=[4, 5, 6])
    assert written.ids[1, :, 0].tolist() == [4, 5, 6]


def test_mistakes_get_a_sentence() -> None:
    model = model_of("gpt2")
    with pytest.raises(InputError, match="has no tokenizer"):
        lens.logit_lens(model, "some text")
    for prompt, sentence in (
        ([], "prompt is empty"),
        ("  ", "prompt is empty"),
        ([3, 61], "no token 61"),
        ([3] * 129, "129 tokens long"),
    ):
        with pytest.raises(InputError, match=sentence):
            lens.logit_lens(model, prompt)
    with pytest.raises(InputError, match="did you mean 'residual'"):
        lens.logit_lens(model, TOKENS, "residul")
    with pytest.raises(InputError, match="positions 0 to 11"):
        lens.logit_lens(model, TOKENS, positions=[12])
    with pytest.raises(InputError, match="2 targets were given for 12"):
        lens.logit_lens(model, TOKENS, target=[1, 2])
    with pytest.raises(InputError, match="give 1 or more"):
        lens.logit_lens(model, TOKENS, k=0)
    with pytest.raises(InputError, match="is 9 tokens"):
        lens.logit_lens(load(), "some text", target="some text")


ties = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)),
                     elements=st.sampled_from([-1.0, 0.0, 2.0]))  # fmt: skip


@given(ties, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_of_equals_the_lowest_comes_first(values: np.ndarray, k: int) -> None:
    top = reading.top_of(torch.from_numpy(values.copy()), k)
    order = np.argsort(-values, axis=1, kind="stable")
    assert np.array_equal(top.ids.numpy(), order[:, :k])
    assert np.array_equal(top.values.numpy(), np.take_along_axis(values, order[:, :k], 1))
    tokens = torch.arange(len(values)) % values.shape[1]
    ranks = reading.rank_of(torch.from_numpy(values.copy()), tokens).tolist()
    assert ranks == [list(row).index(int(t)) for row, t in zip(order, tokens, strict=True)]


def test_half_precision_is_near() -> None:
    half = lens.logit_lens(load(families.fresh("llama").bfloat16()), TOKENS)
    exact = lens.logit_lens(model_of("llama"), TOKENS)
    assert half.kl[-1].max() < 1e-5
    assert np.corrcoef(half.kl[:-1].ravel(), exact.kl[:-1].ravel())[0, 1] > 0.95
    assert (half.ids[-1, :, 0] == exact.ids[-1, :, 0]).mean() > 0.7
