"""Pictures of lenses show the numbers that they were given, and no token can act."""

from pathlib import Path

import numpy as np
import pytest

from headscope import plots
from headscope.errors import InputError
from headscope.plots.figure import Theme
from headscope.table import Attribution, LensGrid

EVIL = "<script>x</script>%{x}"


def grid(positions: int = 3) -> LensGrid:
    shape = (3, positions)
    ids = np.arange(3 * positions * 2).reshape(*shape, 2)
    texts = np.array([f"t{one}" for one in ids.ravel()], dtype=object).reshape(ids.shape)
    texts[0, 0, 0] = EVIL
    return LensGrid(
        name="logit lens, residual",
        rows=("embedding", "L0", "L1"),
        positions=np.arange(positions),
        tokens=tuple(f" w{at}" for at in range(positions)),
        ids=ids,
        texts=texts,
        logits=np.zeros(ids.shape),
        probabilities=np.linspace(0.9, 0.1, ids.size).reshape(ids.shape),
        entropy=np.ones(shape),
        kl=np.full(shape, 0.25),
        targets=np.zeros(positions, int),
        target_texts=("t0",) * positions,
        target_rank=np.zeros(shape, int),
        target_log_prob=np.full(shape, np.log(0.125)),
    )


def split() -> Attribution:
    heads = np.array([[0.9, -2.0], [3.0, 0.5]])
    return Attribution(
        target=EVIL,
        foil=None,
        position=2,
        tokens=("a", "$b", EVIL),
        embedding={"token embedding": 0.25},
        heads=heads,
        biases=np.array([0.1, 0.0]),
        mlps=np.array([-1.0, 2.0]),
        constant=0.5,
        whole=4.25,
        sources=np.stack([heads * 0.25, heads * 0.5, heads * 0.25], -1),
    )


def test_cells_hold_the_likeliest_token_with_the_model_on_top() -> None:
    one = grid()
    trace = plots.lens_grid(one).data[0]
    assert list(trace.y) == ["L1", "L0", "embedding"]
    np.testing.assert_allclose(trace.z, one.probabilities[::-1, :, 0], rtol=1e-6)
    assert trace.text[0][1] == one.texts[2, 1, 0]
    hover = trace.customdata[1][2]
    assert "L0" in hover
    assert "t0: place 1, 0.125" in hover
    assert "0.25 nats" in hover


def test_long_prompts_show_their_end_and_say_so() -> None:
    figure = plots.lens_grid(grid(60))
    assert len(figure.data[0].x) == 40
    assert figure.data[0].x[-1].startswith("59")
    assert "last 40 of 60" in figure.layout.title.subtitle.text


def test_a_waterfall_steps_from_nothing_to_the_logit() -> None:
    one = split()
    bar = plots.waterfall(one, 4).data[0]
    assert list(bar.x) == ["L0H1", "L0 mlp", "L1H0", "L1 mlp", "6 others", "logit"]
    np.testing.assert_allclose(bar.y[:-1], [-2, -1, 3, 2, 2.25])
    np.testing.assert_allclose(bar.base, [0, -2, -3, 0, 2, 0])
    assert bar.y[-1] == one.whole == pytest.approx(bar.base[-2] + bar.y[-2])
    assert "others" not in "".join(plots.waterfall(one, 99).data[0].x)
    with pytest.raises(InputError, match="at least one part"):
        plots.waterfall(one, 0)


def test_source_bars_are_sums_over_heads_or_one_head() -> None:
    one = split()
    np.testing.assert_allclose(plots.source_bars(one).data[0].y, [0.6, 1.2, 0.6])
    np.testing.assert_allclose(plots.source_bars(one, "L1H0").data[0].y, [0.75, 1.5, 0.75])
    with pytest.raises(InputError, match="no head L5H0"):
        plots.source_bars(one, "L5H0")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_tokens_are_escaped_and_all_can_be_saved(theme: Theme, tmp_path: Path) -> None:
    for number, figure in enumerate(
        (
            plots.lens_grid(grid(), theme=theme),
            plots.waterfall(split(), theme=theme),
            plots.source_bars(split(), theme=theme),
        )
    ):
        words = figure.to_json()
        assert "<script" not in words.replace("\\u003c", "<")
        assert "%{x}</" not in words.replace("%{x}</b>", "")
        plots.save(figure, tmp_path / f"{number}.png")
        plots.save(figure, tmp_path / f"{number}.svg")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
