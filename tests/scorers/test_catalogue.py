"""The catalogue is complete and consistent; a scorer of one's own takes three lines."""

import inspect
import re

import pytest
import torch

from headscope.errors import InputError
from headscope.probes import from_tokens
from headscope.scorers import (
    CATALOGUE,
    DEFAULT,
    Scorer,
    between,
    hop_mass,
    long_need,
    long_need_predicted,
    relative_offset,
    resolve,
    row_scorer,
    streaming_gap,
    window_mass,
)
from tests.scorers.support import averaged, random_rows, repeated

PROMISED = {
    "previous_token",
    "current_token",
    "duplicate_token",
    "induction",
    "first_token",
    "entropy",
    "attention_distance",
    "local_window",
    "delimiter",
}


def test_what_the_design_promises_is_in_the_default_scan() -> None:
    assert PROMISED <= set(DEFAULT) <= set(CATALOGUE)
    assert len(set(DEFAULT)) == len(DEFAULT)
    assert all(name == scorer.name for name, scorer in CATALOGUE.items())


RUN = [scorer for scorer in CATALOGUE.values() if scorer.kind != "weight"]
OF_WEIGHTS = [scorer for scorer in CATALOGUE.values() if scorer.kind == "weight"]


@pytest.mark.parametrize("scorer", OF_WEIGHTS, ids=lambda s: s.name)
def test_every_scorer_of_weights_says_what_it_is(scorer: Scorer) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", scorer.name)
    assert scorer.source != "user"
    assert scorer.description
    assert (scorer.probe, scorer.control, scorer.threshold) == (None, None, None)
    assert scorer.spec.direction == "higher"


@pytest.mark.parametrize("scorer", RUN, ids=lambda s: s.name)
def test_every_scorer_says_what_it_is(scorer: Scorer) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", scorer.name)
    units = {"attention", "tokens", "nats", "share", "logits", "norm", "correlation"}
    assert scorer.unit in units
    assert scorer.source != "user"
    assert scorer.probe is not None
    assert scorer.probe.name in {"repeated_tokens", "text", "ioi", "needle", "random_images"}
    assert scorer.description.endswith(".") or "detect_head" in scorer.description
    made_by = {
        "ioi": between,
        "local": window_mass,
        "patch": hop_mass,
        "detect": None,
        "streaming": streaming_gap,
        "long": long_need_predicted if "predicted" in scorer.name else long_need,
    }
    text = inspect.getdoc(made_by.get(scorer.name.split("_")[0]) or scorer.function) or ""
    assert "Weakness:" in text or scorer.name.startswith("detect_head")
    if scorer.threshold is not None:
        assert scorer.unit in ("attention", "share")
        assert 0 < scorer.threshold < 1


def test_thresholds_separate_a_uniform_head_from_a_pure_one() -> None:
    probe = repeated(20)
    flat = random_rows(probe, 1).uniform()
    for name in ("previous_token", "current_token", "duplicate_token", "induction", "first_token"):
        threshold = CATALOGUE[name].threshold
        assert threshold is not None
        assert averaged(CATALOGUE[name], flat, probe).max() < threshold


def test_names_and_values_resolve_in_order() -> None:
    own = relative_offset(5)
    found = resolve(["induction", own, "entropy"])
    assert [one.name for one in found] == ["induction", "offset_5", "entropy"]
    assert found[1] is own
    assert resolve("induction")[0] is CATALOGUE["induction"]
    assert resolve(own) == (own,)
    assert resolve(DEFAULT)
    assert resolve([]) == ()


def test_what_cannot_be_resolved_says_why() -> None:
    with pytest.raises(InputError, match="did you mean 'induction'"):
        resolve(["inducton"])
    with pytest.raises(InputError, match="two scorers are named 'entropy'"):
        resolve(["entropy", CATALOGUE["entropy"]])
    with pytest.raises(InputError, match="not a scorer"):
        inspect.unwrap(resolve)([print])  # unwrapped: not type-checked, as for a user


def test_families_refuse_what_no_query_can_see() -> None:
    assert relative_offset(-1).needs == ("bidirectional", "one_sequence", "text")
    with pytest.raises(InputError, match="width=0"):
        window_mass(0)


def test_a_scorer_of_ones_own() -> None:
    @row_scorer()
    def two_back(rows, probe):  # noqa: ANN001, ANN202 - as a user would write it
        """Attention to the token two back."""
        return rows.at((rows.query_pos - 2).expand(len(probe), -1))

    probe = repeated()
    rows = random_rows(probe)
    values = averaged(two_back, rows, probe)
    torch.testing.assert_close(values, averaged(relative_offset(2), rows, probe))
    assert two_back.description == "Attention to the token two back."


def test_a_missing_mark_is_said_before_anything_runs() -> None:
    probe = from_tokens([[1, 2, 3]])
    with pytest.raises(InputError, match="no mark 'delimiter'"):
        CATALOGUE["delimiter"].queries(probe)
    with pytest.raises(InputError, match="no mark 'io'"):
        CATALOGUE["ioi_name_mover"].queries(probe)


def test_between_marks() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    place = torch.eye(5, dtype=torch.bool)
    marks = {
        "io": place[1:2],
        "s1": place[2:3],
        "s1_next": place[3:4],
        "s2": place[3:4],
        "end": place[4:],
    }
    probe = from_tokens(tokens, marks=marks)
    rows = random_rows(probe)
    for name, (query, key) in {
        "ioi_name_mover": (4, 1),
        "ioi_s_inhibition": (4, 3),
        "ioi_duplicate_token": (3, 2),
        "ioi_induction": (3, 3),
        "ioi_previous_token": (3, 2),
    }.items():
        score = averaged(CATALOGUE[name], rows, probe)
        torch.testing.assert_close(score, rows.pattern[:, :, query, key])
