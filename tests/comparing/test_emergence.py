"""Stories of training against direct runs; induction appears on the bundled checkpoints."""

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.comparing import copy_curves, losses_of_tokens, text_curves
from headscope.errors import InputError
from headscope.table import Emergence, HeadTable
from tests.table.helpers import scores

FEW = ["step-000000", "step-003000", "step-005000"]


@pytest.fixture(scope="module")
def story() -> Emergence:
    return hs.emergence(checkpoints=FEW, scorers=["previous_token", "induction"])


def test_numbers_are_those_of_each_checkpoint(story: Emergence) -> None:
    model = hs.load(revision=FEW[1])
    table = hs.score(model, scorers=["previous_token", "induction"])
    for name in table:
        np.testing.assert_array_equal(story.of(name)[1], table[name].mean)
    probe = hs.probes.repeated_tokens(model, length=50, batch=8, seed=0)
    logits = model.forward(probe.tokens).detach()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), probe.tokens[:, 1:], reduction="none"
    )
    assert story.mean("second copy")[1] == pytest.approx(float(losses[:, -49:].mean()), rel=1e-5)
    assert story.mean("first copy")[1] == pytest.approx(float(losses[:, :50].mean()), rel=1e-5)


def test_induction_appears_and_repetition_becomes_easy(story: Emergence) -> None:
    values = story.of("induction")[(slice(None), *story.best("induction"))]
    assert values[0] < 0.1
    assert values[-1] > 0.7
    assert story.appears("induction") in (1, 2)
    assert story.mean("second copy")[-1] < 0.2 * story.mean("second copy")[0]
    assert story.mean("loss")[-1] < 0.5 * story.mean("loss")[0]
    assert any(said.startswith("induction: L2H") for said in story.findings())
    assert story.steps == [0, 3000, 5000]


def test_losses_skip_padding() -> None:
    model = hs.load()
    probe = hs.probes.text(model, ["the cat and the dog", "the cat"])
    found = losses_of_tokens(model, probe)
    alone = losses_of_tokens(model, hs.probes.text(model, ["the cat"]))
    count = alone.shape[1]
    np.testing.assert_allclose(found[1, :count], alone[0], atol=1e-5)
    assert np.isnan(found[1, count:]).all()
    assert np.isnan(found[:, 0]).all()


def test_curves_by_hand() -> None:
    row = np.concatenate([[np.nan], np.arange(100.0)])[None]
    found = text_curves(row)
    assert found["loss"][0] == 49.5
    assert found["in-context score"][0] == np.arange(90, 100).mean() - np.arange(5, 15).mean()
    assert np.isnan(text_curves(row[:, :10])["in-context score"][0])
    twice = np.array([[np.nan, 5, 6, 7, 1, 2, 3]])  # BOS, then two copies of three
    assert copy_curves(twice, 3) == {"first copy": [6.0], "second copy": [2.5]}


def made(values: list[list[float]], names: tuple[str, ...], **facts: object) -> Emergence:
    tables = [HeadTable([scores("induction", [one], threshold=0.4, **facts)]) for one in values]
    return Emergence("toy", names, tuple(tables))


def test_half_way_is_counted_from_the_last_dip() -> None:
    steep = made([[0.0], [0.6], [0.2], [0.7], [1.0]], ("s1", "s10", "s20", "s30", "s40"))
    assert steep.appears("induction") == 3
    assert steep.steps == [1, 10, 20, 30, 40]
    assert made([[0.5], [0.5]], ("a", "b")).appears("induction") is None
    assert made([[0.0], [1.0]], ("b", "a")).steps == [0, 1]
    assert made([[0.0], [0.1]], ("s1", "s2")).findings() == ["no induction head by s2"]


def test_a_story_as_rows_and_as_a_picture(story: Emergence) -> None:
    frame = story.to_pandas()
    assert len(frame) == 3 * (2 * 12 + 4)
    assert set(frame["kind"]) == {"score", "curve"}
    figure = hs.plots.emergence(story)
    bold = {line.name: line for line in figure.data if line.name}
    head = story.best("induction")
    drawn = bold[f"induction ({head})"]
    np.testing.assert_array_equal(drawn.y, story.of("induction")[(slice(None), *head)])
    assert list(drawn.x) == [1500, 3000, 5000]  # step 0 at half of the next
    assert {"loss", "in-context score", "first copy", "second copy"} <= set(bold)


def test_mistakes_get_a_sentence() -> None:
    with pytest.raises(InputError, match="does not come with checkpoints"):
        hs.emergence("tiny-llama")
    with pytest.raises(InputError, match="two different checkpoints"):
        hs.emergence(checkpoints=["step-000000"])
    with pytest.raises(InputError, match="scorers= is empty"):
        hs.emergence(checkpoints=FEW, scorers=[])
    with pytest.raises(InputError, match="two checkpoints or more"):
        made([[0.0]], ("s1",))
