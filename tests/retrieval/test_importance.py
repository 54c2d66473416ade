"""What a linear forecast finds of the need, against closed cases and plain loops."""

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.retrieval.need import turned
from tests.models import families


def texts(length: int = 24, batch: int = 30) -> hs.Probe:
    drawn = torch.Generator().manual_seed(0)
    return hs.probes.from_tokens(torch.randint(3, families.VOCAB, (batch, length), generator=drawn))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_layer_that_reads_the_stream_itself_is_foretold(family: str) -> None:
    """Queries of the first layer are linear in its stream, but for the norm's division."""
    module = families.build(family)
    model = hs.load(module)
    table = hs.retrieval.token_importance(model, texts(), keep=5)
    found, recent = table["importance_found"].mean, table["importance_recent"].mean
    assert (found[0] > 0.9).all()
    assert (found[0] > recent[0]).all()
    assert (found <= 1 + 1e-9).all()


def test_turning_is_what_attention_does() -> None:
    model = hs.load(families.build("llama"))
    rotation = model.parts.rotation(0)
    x = torch.randn(2, 7, model.shape.d_head, dtype=torch.float64)
    there = turned(x, rotation, 1.0)
    torch.testing.assert_close(turned(there, rotation, -1.0), x)
    for i, j in ((5, 2), (6, 0)):
        expected = rotation.turned(x[0, i], i - j) @ x[1, j]
        assert float(there[0, i] @ there[1, j]) == pytest.approx(float(expected))


def test_shares_are_masses_of_chosen_keys() -> None:
    model, probe, keep = hs.load(families.build("gpt2")), texts(batch=6), 4
    table = hs.retrieval.token_importance(model, probe, keep=keep)
    measured = probe.examples(slice(1, None, 2))
    patterns = hs.capture.collect(model, measured)
    for layer, head, number in ((0, 1, 0), (1, 3, 2)):
        pattern = patterns[layer].pattern[number, head].tolist()
        shares = []
        for i in range(keep, probe.length):
            row = pattern[i][: i + 1]
            shares.append(sum(row[-keep:]) / sum(sorted(row)[-keep:]))
        found = table["importance_recent"].per_example[layer, head, number]
        assert found == pytest.approx(np.mean(shares), abs=1e-5)


def test_what_it_lacks_is_said() -> None:
    model = hs.load(families.build("gpt2"))
    with pytest.raises(InputError, match="layer=7"):
        hs.retrieval.token_importance(model, texts(), layer=7)
    with pytest.raises(InputError, match="needs 4 texts longer than 9"):
        hs.retrieval.token_importance(model, texts(batch=3))
    late = hs.retrieval.token_importance(model, texts(), layer=1)
    assert np.isnan(late["importance_found"].mean[0]).all()
    assert np.isfinite(late["importance_found"].mean[1]).all()
