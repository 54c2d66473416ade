"""A grid of needles, cell by cell on disk: the same as all at once, also after a stop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headscope as hs
from headscope.errors import InputError
from headscope.retrieval import decoded, forms, scan_grid

GRID: dict[str, Any] = {"lengths": [64, 110], "depths": [0, 0.6], "per_cell": 2, "seed": 5}


@pytest.fixture(scope="module")
def model() -> Any:
    return hs.load("tiny-llama")


def same(a: Any, b: Any) -> None:
    for name in ("by_set", "by_step", "activation"):
        one, other = getattr(a, name), getattr(b, name)
        np.testing.assert_array_equal(one.per_example, other.per_example)
        np.testing.assert_array_equal(one.null, other.null)
    assert [run.response for run in a.runs.runs] == [run.response for run in b.runs.runs]


def test_cells_equal_the_whole_grid_and_are_kept(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = decoded(model, hs.probes.needle(model, **GRID), progress=False)
    same(scan_grid(model, **GRID, progress=False).retrieval, whole)
    calls: list[int] = []
    module: Any = forms
    real = module.follow_both

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == 2:  # two cells, each with its control
            raise KeyboardInterrupt
        calls.append(len(args[1]))
        return real(*args, **kwargs)

    monkeypatch.setattr(forms, "follow_both", stopping)
    with pytest.raises(KeyboardInterrupt):
        scan_grid(model, **GRID, folder=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.parquet"))) == 2

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(0)
        return real(*args, **options)

    monkeypatch.setattr(forms, "follow_both", counting)
    again = scan_grid(model, **GRID, folder=tmp_path, progress=False)
    assert len(calls) == 4  # two more, for the two cells that were missing
    same(again.retrieval, whole)
    more = scan_grid(model, **(GRID | {"depths": [0, 0.3, 0.6]}), folder=tmp_path, progress=False)
    assert len(calls) == 6  # a larger grid finds the cells of the smaller one
    assert more.retrieval.recall_grid().share.shape == (2, 3)
    scan_grid(model, **(GRID | {"seed": 6}), folder=tmp_path, progress=False)
    assert len(calls) == 10  # other texts are other cells


def test_a_damaged_cell_is_named(model: Any, tmp_path: Path) -> None:
    small: dict[str, Any] = GRID | {"lengths": 64, "depths": [0.5], "per_cell": 1}
    scan_grid(model, **small, folder=tmp_path, progress=False)
    (file,) = tmp_path.glob("*.parquet")
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="is damaged"):
        scan_grid(model, **small, folder=tmp_path, progress=False)


def test_the_picture_shows_every_cell(model: Any) -> None:
    found, _ = scan_grid(model, **GRID, progress=False)
    grid = found.recall_grid()
    figure = hs.plots.recall_grid(grid)
    assert figure.data[0].z.shape == (2, 2)
    assert list(figure.data[0].x) == ["64", "110"]
    assert list(figure.data[0].y) == ["0%", "60%"]
    frame = grid.to_pandas()
    assert frame["count"].tolist() == [2] * 4
    assert frame.share.between(0, 1).all()
