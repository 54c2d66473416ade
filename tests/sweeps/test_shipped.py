"""The configs that ship run, and show what they are for."""

import numpy as np
import pytest

from headscope.models import bundled
from headscope.sweeps import Results, read, read_config, run_sweep
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda file: file.stem)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("shipped") / "run"
    config = read_config(request.param)
    assert config.name == request.param.stem
    outcome = run_sweep(config, out)
    assert outcome.compacted
    return read(out)


def test_there_are_five() -> None:
    assert {file.stem for file in CONFIGS} >= {
        "across-checkpoints",
        "edits-compared",
        "induction-against-random",
        "ioi-all-heads",
        "pruning-curves",
    }


def test_a_shipped_config_gives_its_whole_table(done: Results) -> None:
    assert done.complete
    assert np.isfinite(done.rows["effect"].to_numpy()).all()
    checks[done.plan.name](done)


def _heads(done: Results) -> None:
    scores = done.scores(metric="logit_difference")
    low, high = scores.interval()
    assert scores.n.min() == 16
    assert (high < 0).any(), "some head carries the task"
    assert (low > high).sum() == 0


def _induction(done: Results) -> None:
    best = done.effects("induction", model="tiny-llama", metric="accuracy").mean
    others = done.effects("random", model="tiny-llama", metric="accuracy").mean
    assert best.shape == (1, 1)
    assert others.shape == (20, 1)


def _curves(done: Results) -> None:
    small, other, large = map(done.effects, ("attribution", "gradient", "largest-first"))
    random = done.effects("random")
    assert random.per_example.shape[:2] == (5, 13)
    for curve in (small, other, large, random):
        assert (curve.mean[:, 0] == 0).all()
        np.testing.assert_allclose(curve.mean[:, -1], small.mean[0, -1], atol=1e-5)
    for curve in (small, other):
        assert np.abs(curve.mean[0, :9]).max() < 0.1, "nine of twelve heads can go"
        assert random.mean[:, 3].mean() > 1
        assert large.mean[0, 3] > 3


def _edits(done: Results) -> None:
    edits = done.to_pandas().groupby("edit", observed=True)["seed"].unique().to_dict()
    assert len(edits) == 7
    assert {name for name, seeds in edits.items() if len(seeds) > 1} == {"resample"}
    table = done.table()
    assert {"resample#0:logit_difference", "resample#1:logit_difference"} < set(table)
    assert table["zero:logit_difference"].mean.shape == (3, 4)
    own, other = (table[f"{name}:logit_difference"].mean for name in ("mean", "mean~stories"))
    assert not np.allclose(own, other)


def _checkpoints(done: Results) -> None:
    labels = [model.label for model in done.plan.models]
    assert labels == [f"tiny-gpt2@{one}" for one in bundled.checkpoints("tiny-gpt2")]
    sizes = [float(np.abs(done.scores(model=label).mean).max()) for label in labels]
    assert max(sizes[1:]) > 3 * sizes[0], "an untrained model has no head that matters as much"


checks = {
    "across-checkpoints": _checkpoints,
    "edits-compared": _edits,
    "induction-against-random": _induction,
    "ioi-all-heads": _heads,
    "pruning-curves": _curves,
}
