"""Inside ``model.edited`` everything is edited: passes, captures, ablations; outside nothing."""

from collections.abc import Callable

import pytest
import torch

import headscope as hs
from headscope.edits import HeadEdit
from headscope.models.protocol import HeadModel
from tests.models.families import build, tokens

PROBE = hs.probes.from_tokens(tokens())
HEAD = "L1H1"


def frozen(model: HeadModel) -> HeadEdit:
    """Patterns of the same texts in another order: far from those of each text itself."""
    donors = hs.ablation.head_values(model, tokens().flip(0), site="pattern")
    return hs.edits.freeze_pattern(HEAD, donors)


EDITS: dict[str, Callable[[HeadModel], HeadEdit]] = {
    "z": lambda model: hs.edits.zero(HEAD),
    "query": lambda model: hs.edits.uniform(HEAD),
    "key": lambda model: hs.edits.scale("L1H0", 3.0, site="key"),
    "value": lambda model: hs.edits.scale("L1H0", 3.0, site="value"),
    "pattern": frozen,
}


@pytest.mark.parametrize("site", EDITS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom"])
def test_a_pass_inside_is_the_pass_with_these_edits(family: str, site: str) -> None:
    model = hs.load(build(family))
    if family == "bloom" and site == "key":
        pytest.skip("transformer-lens does not show bloom's keys")
    edit = EDITS[site](model)
    plain, wanted = model.forward(PROBE.tokens), model.forward(PROBE.tokens, edits=[edit])
    assert not torch.allclose(plain, wanted, atol=1e-3)
    with model.edited([edit]):
        torch.testing.assert_close(model.forward(PROBE.tokens), wanted)
        first = model.forward(PROBE.tokens, edits=[hs.edits.zero("L0H0")])
    torch.testing.assert_close(
        first, model.forward(PROBE.tokens, edits=[edit, hs.edits.zero("L0H0")])
    )
    torch.testing.assert_close(model.forward(PROBE.tokens), plain)


def test_captures_and_scores_inside_show_the_edit() -> None:
    model = hs.load(build("llama"))
    with model.edited([hs.edits.uniform(HEAD)]):
        rows = hs.capture.collect(model, PROBE, layers=[1], heads=[1])[1].pattern[:, 0]
        scores = hs.score(model, PROBE, "normalised_entropy")["normalised_entropy"]
    even = torch.ones_like(rows[0]).tril() / torch.arange(1, rows.shape[1] + 1)[:, None]
    torch.testing.assert_close(rows, even.expand_as(rows))
    assert scores.mean[1, 1] == pytest.approx(1, abs=1e-5)
    assert (scores.mean[0] < 0.9).all()


def test_scopes_nest_and_keep_to_their_model() -> None:
    one, two = hs.load(build("llama")), hs.load(build("qwen2"))
    inner, outer = hs.edits.uniform("L2H0"), hs.edits.uniform("L0H0")
    wanted = one.forward(PROBE.tokens, edits=[outer, inner])
    other = two.forward(PROBE.tokens)
    with one.edited([outer]), one.edited([inner]):
        torch.testing.assert_close(one.forward(PROBE.tokens), wanted)
        torch.testing.assert_close(two.forward(PROBE.tokens), other)


@torch.no_grad()
@pytest.mark.parametrize("site", ["z", "query", "key"])
def test_ablations_inside_start_from_the_edited_model(site: str) -> None:
    model = hs.load(build("llama"))
    edit, metric = EDITS[site](model), hs.metrics.loss
    clean = metric(model.forward(PROBE.tokens, edits=[edit]), PROBE).mean()
    both = model.forward(PROBE.tokens, edits=[edit, hs.edits.zero("L2H3")])
    wanted = float(metric(both, PROBE).mean() - clean)
    with model.edited([edit]):
        found = hs.ablate_heads(model, PROBE, metric, "zero", heads=["L2H3"])
    assert found.mean[2, 3] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    after = hs.ablate_heads(model, PROBE, metric, "zero", heads=["L2H3"])
    assert after.provenance.checks["engine"] == "suffix replay"
