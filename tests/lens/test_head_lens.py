"""What single heads say: the same numbers as attribution, token by token."""

import numpy as np
import pytest

from headscope import lens
from headscope.errors import InputError
from headscope.models.loading import load
from headscope.pruning import prune
from tests.handwired import handwired_gpt2
from tests.lens.helpers import TOKENS, model_of
from tests.models.families import VOCAB


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere2"])
def test_values_are_attributions_above_their_mean(family: str) -> None:
    model = model_of(family)
    words = lens.head_lens(model, TOKENS, 6, k=VOCAB)
    up, down = words.values[:, :, 0], words.values[:, :, 1]
    assert (np.diff(up, axis=-1) <= 0).all()
    np.testing.assert_allclose(up, down[..., ::-1], atol=1e-6)  # every token, from both ends
    np.testing.assert_allclose(up.mean(-1), 0, atol=1e-5)
    place = words.ids[:, :, 0].argsort(-1)
    by_token = np.take_along_axis(up, place, -1)
    for target, foil in ((5, 9), (0, 60)):
        split = lens.attribute(model, TOKENS, target, foil, position=6, sources=False)
        difference = by_token[..., target] - by_token[..., foil]
        np.testing.assert_allclose(difference, split.heads, atol=1e-4, rtol=1e-3)


def test_wired_heads_say_what_they_were_wired_to_say() -> None:
    wired = handwired_gpt2()
    words = lens.head_lens(load(wired.model), [3, 4, 5, 6, 3, 4])
    (best, value), *others = words.promoted(wired.roles["induction"])
    assert best == "5"
    assert value - others[0][1] == pytest.approx(wired.gain, abs=1e-3)
    assert words.suppressed("L1H1")[0][0] == "3"  # anti-copy of the token before
    frame = words.to_pandas()
    assert len(frame) == 2 * 5 * 2 * 10
    assert set(frame.sign) == {"promoted", "suppressed"}


def test_mistakes_get_a_sentence() -> None:
    words = lens.head_lens(model_of("gpt2"), TOKENS)
    with pytest.raises(InputError, match="no head L7H0"):
        words.promoted("L7H0")
    with pytest.raises(InputError, match="give 1 or more"):
        lens.head_lens(model_of("gpt2"), TOKENS, k=0)


def test_heads_that_were_pruned_say_nothing() -> None:
    gone = ["L0H0", "L0H1", "L0H2", "L0H3", "L1H2"]
    model = load(prune(model_of("gpt2"), gone))
    words = lens.head_lens(model, TOKENS, k=3)
    with pytest.raises(InputError, match="L1H2 was pruned"):
        words.promoted("L1H2")
    with pytest.raises(InputError, match=r"no head L0H0 here: layers \(1, 2\)"):
        words.promoted("L0H0")
    assert len(words.suppressed("L1H1")) == 3
    frame = words.to_pandas()
    there = {
        (int(layer), int(head)) for layer, head in zip(frame.layer, frame["head"], strict=True)
    }
    assert there == set(model.shape.heads)
