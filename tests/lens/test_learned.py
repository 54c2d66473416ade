"""Learned lenses: closed forms against numpy, starts, seeds, honest reports, files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope import lens
from headscope.errors import InputError
from headscope.lens import fitting
from headscope.lens.fitting import FitReport
from headscope.lens.linear import least_squares
from headscope.probes.probe import Probe
from tests.lens.helpers import TOKENS, model_of
from tests.models.families import VOCAB


def probe_of(batch: int = 12, length: int = 8) -> Probe:
    generator = torch.Generator().manual_seed(3)
    return hs.probes.from_tokens(torch.randint(3, VOCAB, (batch, length), generator=generator))


@pytest.mark.parametrize("rows", [5, 40])
def test_least_squares_is_numpys(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(least_squares(x.mT @ x, x.mT @ y).numpy(), expected, atol=1e-8)


def streams_of(model: Any, probe: Probe) -> tuple[Tensor, Tensor]:
    rows, last, _ = fitting.streams(model, probe)
    return rows.double(), last.double()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_shortcuts_are_least_squares_on_the_streams(family: str) -> None:
    model, probe = model_of(family), probe_of()
    fitted = lens.linear_shortcuts(model, probe, held_out=0.25, seed=1)
    data = fitting.split_data(model, probe, 0.25, 1)
    assert (len(data.fit), len(data.held_out)) == (9, 3)
    x, y = streams_of(model, data.fit)
    unseen, wanted = streams_of(model, data.held_out)
    for place in range(3):
        expected = np.linalg.lstsq(x[place].numpy(), y.numpy(), rcond=None)[0]
        scale = np.abs(expected).max()
        assert np.abs(fitted.weight[place].numpy() - expected).max() < 1e-3 * scale
        missed = unseen[place].numpy() @ expected - wanted.numpy()
        centred = wanted.numpy() - wanted.numpy().mean(0)
        r2 = 1 - (missed**2).sum() / (centred**2).sum()
        assert fitted.settings["r2"][place] == pytest.approx(r2, abs=1e-3)
    to = lens.linear_shortcuts(model, probe, to="L0", held_out=0.25, seed=1)
    expected = np.linalg.lstsq(x[0].numpy(), x[1].numpy(), rcond=None)[0]
    assert np.abs(to.weight[0].numpy() - expected).max() < 1e-3 * np.abs(expected).max()
    assert len(to.weight) == 1


def test_the_report_is_the_held_out_divergence() -> None:
    model, probe = model_of("llama"), probe_of()
    fitted = lens.linear_shortcuts(model, probe, seed=4)
    held = fitting.split_data(model, probe, 0.2, 4).held_out
    for example in range(len(held)):
        ids = held.tokens[example].tolist()
        plain, learned = lens.logit_lens(model, ids), lens.logit_lens(model, ids, lens=fitted)
        for place in range(3):
            pair = (fitted.report.plain, fitted.report.learned)
            for report, grid in zip(pair, (plain, learned), strict=True):
                assert report[place, example] == pytest.approx(grid.kl[place].mean(), rel=1e-3)
    assert np.array_equal(learned.kl[-1], plain.kl[-1])  # the last place is left alone
    assert learned.name.startswith("linear shortcuts")


def test_a_tuned_lens_starts_as_the_plain_one_and_learns() -> None:
    model = model_of("llama")
    probe = probe_of(24)
    start = lens.tuned_lens(model, probe, steps=1, learning_rate=1e-9)
    assert lens.tuned_lens(model, probe, steps=1).settings["learning_rate"] == 1e-2  # it is narrow
    np.testing.assert_allclose(start.report.learned, start.report.plain, rtol=1e-3)
    fitted = lens.tuned_lens(model, probe, steps=15, learning_rate=1e-2, seed=2)
    again = lens.tuned_lens(model, probe, steps=15, learning_rate=1e-2, seed=2)
    assert torch.equal(fitted.weight, again.weight)
    assert torch.equal(fitted.bias, again.bias)
    assert fitted.report.better.all()
    assert fitted.report.learned.mean() < 0.9 * fitted.report.plain.mean()
    assert "NO BETTER" not in repr(fitted)
    other = lens.tuned_lens(model, probe, steps=1, seed=3)
    assert not torch.equal(fitted.weight, other.weight)


def test_a_tuned_lens_descends_along_the_gradient_of_the_divergence() -> None:
    """One step of Adam is one step of its rate against the sign of the gradient."""
    model, probe = model_of("gpt2"), probe_of(6)
    fitted = lens.tuned_lens(model, probe, steps=1, learning_rate=1e-3, seed=0)
    batch = next(fitting.random_batches(fitting.split_data(model, probe, 0.2, 0).fit, 1, 0))
    rows, last = streams_of(model, batch)
    unembedding = model.unembedding
    change = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    final = unembedding.logits(last.float()).double().log_softmax(1)
    x = rows[1] + change
    x = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, correction=0, keepdim=True) + unembedding.epsilon
    ).sqrt()
    logits = (
        x * unembedding.gain.double() + unembedding.bias.double()
    ) @ unembedding.W_U.double().T
    (final.exp() * (final - logits.log_softmax(1))).sum(1).mean().backward()
    assert change.grad is not None
    clear = change.grad.abs() > 1e-4
    assert clear.sum() > 20
    np.testing.assert_allclose(
        fitted.bias[1][clear].numpy(), -1e-3 * change.grad[clear].sign().numpy(), rtol=1e-2
    )


def test_a_lens_that_learned_nothing_says_so() -> None:
    plain = np.full((2, 3), 0.5)
    worse = FitReport(("a", "b"), plain + 0.1, plain, np.ones((2, 2)), 9, 9)
    assert str(worse).startswith("NO BETTER than the plain lens")
    assert not worse.better.any()
    better = FitReport(("a", "b"), plain - 0.1, plain, np.ones((2, 2)), 9, 9)
    assert "NO BETTER" not in str(better)
    assert list(better.to_pandas().saved) == pytest.approx([0.1, 0.1])
    # 32 dimensions from 14 tokens: fits itself, and nothing else
    few = lens.linear_shortcuts(model_of("llama"), probe_of(3, 7), seed=0)
    assert few.settings["r2"][0] < 0.9


def test_an_unlearned_attention_lens_is_the_direct_path() -> None:
    model = model_of("gemma2")
    shape = model.shape
    zero = lens.AttentionLens(
        layers=(0, 2),
        inner=torch.zeros(2, shape.n_heads, shape.d_head, 2),
        outer=torch.zeros(2, shape.n_heads, 2, VOCAB),
        shift=torch.zeros(2, VOCAB),
        report=None,
        model="x",
        digest=model.digest(),
    )
    read, plain = zero.read(model, TOKENS, 6, k=4), lens.head_lens(model, TOKENS, 6, k=4)
    assert np.array_equal(read.ids, plain.ids[[0, 2]])
    np.testing.assert_allclose(read.values, plain.values[[0, 2]], atol=1e-5)


@pytest.mark.parametrize(("family", "rank"), [("llama", 3), ("gpt2", None)])
def test_an_attention_lens_learns(family: str, rank: int | None) -> None:
    model, probe = model_of(family), probe_of(12)
    options: dict[str, Any] = {"rank": rank, "steps": 10, "learning_rate": 1e-2}
    fitted = lens.attention_lens(model, probe, [1, 2], **options)
    again = lens.attention_lens(model, probe, [1, 2], **options)
    assert torch.equal(fitted.outer, again.outer)
    assert fitted.report is not None
    assert fitted.report.rows == ("L1", "L2")
    assert fitted.report.gain.mean() > 0
    size = model.shape.d_head if rank is None else rank
    assert fitted.outer.shape == (2, 4, size, VOCAB)
    # what the layer says is the sum of what its heads say, and the report is its divergence
    held = fitting.split_data(model, probe, 0.2, 0).held_out
    from headscope.lens.attention import correction, head_streams, layer_logits
    from headscope.lens.reading import constants

    one = held.examples(slice(0, 1))
    seen, biases = head_streams(model, one, (2,)), constants(model.unembedding)
    with torch.no_grad():
        z = seen.z[2]
        learned = correction(z, fitted.inner[1], fitted.outer[1], fitted.shift[1])
        whole = layer_logits(model, 2, z, biases) + learned
        heads = fitted.by_head(model, 1, z).sum(1) + biases + fitted.shift[1]
        final = model.forward(one.tokens)[0].log_softmax(1)
    np.testing.assert_allclose(whole.numpy(), heads.numpy(), atol=1e-3, rtol=1e-4)
    loss = (final.exp() * (final - whole.log_softmax(1))).sum(1).mean()
    assert fitted.report.learned[1, 0] == pytest.approx(float(loss), rel=1e-3)


def test_saved_lenses_come_back(tmp_path: Path) -> None:
    model, probe = model_of("gpt2"), probe_of(6)
    shortcut = lens.linear_shortcuts(model, probe)
    heads = lens.attention_lens(model, probe, [1], rank=2, steps=1)
    shortcut.save(tmp_path / "a")
    heads.save(tmp_path / "b")
    assert sorted(one.name for one in (tmp_path / "a").iterdir()) == [
        "config.json",
        "lens.safetensors",
    ]
    one, other = lens.load(tmp_path / "a"), lens.load(tmp_path / "b")
    assert isinstance(one, lens.ResidualLens)
    assert isinstance(other, lens.AttentionLens)
    assert torch.equal(one.weight, shortcut.weight)
    assert repr(one) == repr(shortcut)
    assert one.settings["r2"] == shortcut.settings["r2"]
    expected = heads.read(model, TOKENS, k=3)
    assert np.array_equal(other.read(model, TOKENS, k=3).values, expected.values)
    with pytest.raises(InputError, match="has other weights"):
        lens.logit_lens(model_of("llama"), TOKENS, lens=one)
    with pytest.raises(InputError, match="has other weights"):
        other.read(model_of("llama"), TOKENS)
    with pytest.raises(InputError, match="site='residual'"):
        lens.logit_lens(model, TOKENS, "mlp", lens=one)


def test_damaged_files_get_a_sentence(tmp_path: Path) -> None:
    model = model_of("gpt2")
    folder = tmp_path / "lens"
    lens.linear_shortcuts(model, probe_of(6)).save(folder)
    config = folder / "config.json"
    facts = json.loads(config.read_text())
    for change, sentence in (
        ({"kind": "tunned"}, "did you mean 'tuned'"),
        ({"kind": "attention"}, "should hold inner"),
        ({"report": {}}, "is inconsistent"),
        ({"surprise": 1}, "unknown key"),
    ):
        config.write_text(json.dumps({**facts, **change}))
        with pytest.raises(InputError, match=sentence):
            lens.load(folder)
    config.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        lens.load(folder)
    config.write_text(json.dumps(facts))
    (folder / "lens.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        lens.load(folder)
    with pytest.raises(InputError, match="holds no saved lens"):
        lens.load(tmp_path / "nowhere")


def test_mistakes_get_a_sentence() -> None:
    model = model_of("gpt2")
    with pytest.raises(InputError, match="at least two"):
        lens.tuned_lens(model, probe_of(1))
    with pytest.raises(InputError, match="steps and learning_rate"):
        lens.tuned_lens(model, probe_of(), steps=0)
    with pytest.raises(InputError, match="did you mean 'L1'"):
        lens.linear_shortcuts(model, probe_of(), to="l1")
    with pytest.raises(InputError, match="no attention in layer 9"):
        lens.attention_lens(model, probe_of(), [9])
    with pytest.raises(InputError, match="share of the examples"):
        lens.linear_shortcuts(model, probe_of(), held_out=1.0)


def test_padding_is_neither_fitted_to_nor_judged_by() -> None:
    model = model_of("mistral")
    ids = probe_of(8).tokens
    real = torch.ones_like(ids, dtype=torch.bool)
    real[::2, -3:] = False
    padded = hs.probes.from_tokens(ids, real)
    other = torch.where(real, ids, 7)
    again = hs.probes.from_tokens(other, real)
    one, two = (lens.linear_shortcuts(model, each) for each in (padded, again))
    assert torch.equal(one.weight, two.weight)
    assert one.report.tokens + one.report.fitted == int(real.sum())
