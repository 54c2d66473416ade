import numpy as np
import pytest

from headscope import plots
from headscope.errors import InputError


def causal(n: int) -> np.ndarray:
    pattern = np.tril(np.random.default_rng(0).random((n, n)))
    return pattern / pattern.sum(1, keepdims=True)


def test_colours_are_bytes_within_half_a_step_of_the_truth() -> None:
    pattern = causal(100)
    trace = plots.attention_pattern(pattern).data[0]
    assert trace.z.dtype == np.uint8
    np.testing.assert_allclose(trace.z / 255 * pattern.max(), pattern, atol=pattern.max() / 500)
    assert trace.customdata is None


def test_short_patterns_keep_exact_values_for_hovering() -> None:
    pattern = causal(20)
    np.testing.assert_allclose(
        plots.attention_pattern(pattern).data[0].customdata, pattern, rtol=1e-6
    )


@pytest.mark.parametrize("n", [513, 1025])
def test_long_patterns_keep_the_largest_of_each_block_and_say_so(n: int) -> None:
    pattern = np.zeros((n, n))
    pattern[n - 1, 7] = 1.0
    figure = plots.attention_pattern(pattern)
    block = -(-n // 512)
    assert max(figure.data[0].z.shape) <= 512
    assert figure.data[0].z[-1, 7 // block] == 255
    assert figure.data[0].z.astype(int).sum() == 255
    assert f"largest of {block} x {block}" in figure.layout.title.subtitle.text
    assert figure.data[0].y[-1].endswith(f"-{n - 1}")


def test_fewer_queries_are_the_last_positions() -> None:
    trace = plots.attention_pattern(causal(5)[3:], list("abcde")).data[0]
    assert list(trace.y) == ["3 d", "4 e"]
    assert list(trace.x) == ["0 a", "1 b", "2 c", "3 d", "4 e"]


def test_tokens_are_text_and_show_what_is_invisible() -> None:
    tokens = ["<b>x</b>", "\u202e", " the", "\n", "<b>x</b>"]
    labels = list(plots.attention_pattern(causal(5), tokens, title="<i>t</i>").data[0].x)
    assert labels == [
        "0 &lt;b&gt;x&lt;/b&gt;",
        "1 ⟨202E⟩",
        "2 ␣the",
        "3 ↵",
        "4 &lt;b&gt;x&lt;/b&gt;",
    ]


def test_wrong_number_of_tokens() -> None:
    with pytest.raises(InputError, match="3 tokens"):
        plots.attention_pattern(causal(5), ["a"] * 3)


def test_an_empty_pattern_draws() -> None:
    assert plots.attention_pattern(np.full((3, 3), np.nan)).data[0].z.max() == 0
