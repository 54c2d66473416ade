"""Six kinds of heads of a real language model: which are named, and what ablating them does.

Where no head is named, that is the figure; the strongest candidate's value and the effect of
ablating it are figures too. The whole page is in ``docs/howto/kinds.md``.
"""

import json
from collections.abc import Callable

import numpy as np
import pytest

import headscope as hs
from headscope.heads import HeadIndex
from headscope.kinds import KINDS, AskedModel
from headscope.models.protocol import HeadModel
from tests.real.conftest import FIGURES

SIX = (
    "previous_token", "duplicate_token", "induction", "copy_suppression", "successor",
    "function_vector",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(model: HeadModel) -> hs.kinds.KindTable:
    return hs.kinds.survey(model, SIX, confirm=False)


@pytest.mark.parametrize("name", SIX)
def test_heads_of_a_kind_are_those_of_before(
    name: str, found: hs.kinds.KindTable, stays: Callable[..., None]
) -> None:
    assert not found.left_out
    stays(f"kind_{name}", [str(head) for head in found.named(name)])
    stays(f"kind_{name}_most", float(np.nanmax(found.values[name])))


@pytest.mark.parametrize("name", SIX)
def test_ablating_the_strongest_head_of_a_kind_does_what_it_did(
    name: str, model: HeadModel, found: hs.kinds.KindTable, stays: Callable[..., None]
) -> None:
    values = found.values[name]
    head = HeadIndex(*map(int, np.unravel_index(np.nanargmax(values), values.shape)))
    confirm = KINDS[name].confirm
    assert confirm is not None
    probe = confirm.probe(AskedModel(model)).examples(slice(0, 8))
    effects = hs.ablate_heads(model, probe, confirm.metric, heads=[head])
    stays(f"kind_{name}_strongest", [str(head)])
    # A difference of sums of logits: more of its digits move than those of a share.
    known = json.loads(FIGURES.read_text(encoding="utf-8"))[f"kind_{name}_effect"]
    assert effects.mean[head] == pytest.approx(known, rel=1e-3, abs=1e-3)
    if found.named(name) and name in ("previous_token", "induction", "function_vector"):
        assert effects.mean[head] * confirm.sign > 0
