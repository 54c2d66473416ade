import numpy as np
import pytest

from headscope import plots
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import mean_interval
from headscope.errors import InputError
from headscope.plots.export import draw
from headscope.table import EffectGrid


def grid(steps: tuple[str, ...] = ("0", "2", "5")) -> EffectGrid:
    values = np.random.default_rng(0).normal(size=(4, 3, 6))
    values[1, 2] = np.nan
    arms = ("<a>", "short", "r0", "r1")
    return EffectGrid(
        ScoreSpec("pruning"), ("arm", "removed"), (arms, steps), values, np.full(6, 2.0)
    )


def test_lines_are_means_and_bands_are_intervals() -> None:
    one = grid()
    figure = plots.curves(one, controls=("r0", "r1"))
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert list(lines) == ["random (2)", "&lt;a&gt;", "short"]
    np.testing.assert_allclose(lines["&lt;a&gt;"].y, one.mean[0] + 2)
    assert lines["&lt;a&gt;"].x == (0, 2, 5)
    assert lines["short"].x == (0, 2)
    np.testing.assert_allclose(lines["random (2)"].y, one.mean[2:].mean(0) + 2)
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    low, high = mean_interval(one.per_example + 2.0)
    np.testing.assert_allclose(bands[1].y, [*low[0], *high[0][::-1]])
    np.testing.assert_allclose(bands[0].y[:3], one.mean[2:].min(0) + 2)
    drawn = draw(figure).axes[0]
    assert next(text.get_text() for text in drawn.get_legend().get_texts()) == "random (2)"


def test_other_grids_are_refused() -> None:
    with pytest.raises(InputError, match="no arm 'r9'"):
        plots.curves(grid(), controls=["r9"])
    with pytest.raises(InputError, match="not numbers"):
        plots.curves(grid(("a", "b", "c")))
    flat = EffectGrid(ScoreSpec("x"), ("group",), (("a",),), np.zeros((1, 2)), np.zeros(2))
    with pytest.raises(InputError, match="arms by steps"):
        plots.curves(flat)


def test_a_single_step_is_a_point_with_its_interval() -> None:
    values = np.random.default_rng(0).normal(size=(3, 1, 6))
    one = EffectGrid(
        ScoreSpec("pruning"),
        ("arm", "removed"),
        (("a", "r0", "r1"), ("5",)),
        values,
        np.full(6, 2.0),
    )
    figure = plots.curves(one, controls=("r0", "r1"))
    points = {trace.name: trace for trace in figure.data}
    assert {trace.mode for trace in points.values()} == {"markers"}
    low, high = mean_interval(values + 2.0)
    ends = (points["a"].y[0] - points["a"].error_y.arrayminus[0], points["a"].error_y.array[0])
    np.testing.assert_allclose(ends, (low[0, 0], high[0, 0] - points["a"].y[0]))
    drawn = draw(figure).axes[0]
    assert any(len(line.get_xdata()) == 1 for line in drawn.lines)
