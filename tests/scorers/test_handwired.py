"""Every role of the hand-wired models is named by its scorer, with the computed value."""

import pytest
import torch

from headscope.heads import HeadIndex
from headscope.probes import from_tokens, repeated_tokens
from headscope.probes.probe import Probe
from headscope.scorers import CATALOGUE
from headscope.views import AttentionRows
from tests.handwired import Handwired, handwired_gpt2, handwired_llama
from tests.scorers.support import averaged, visible_keys

N = 12


@pytest.fixture(scope="module", params=["gpt2", "gpt2 without BOS", "llama"])
def case(request: pytest.FixtureRequest) -> tuple[Handwired, Probe]:
    built = handwired_llama() if request.param == "llama" else handwired_gpt2()
    part = torch.stack([torch.randperm(built.shape.d_vocab - 1)[:N] + 1 for _ in range(3)])
    bos = torch.full((3, int("without" not in request.param)), built.bos)
    return built, from_tokens(torch.cat([bos, part, part], 1))


def scores(built: Handwired, probe: Probe, name: str) -> dict[HeadIndex, float]:
    found = {}
    for layer, pattern in enumerate(built.patterns(probe.tokens)):
        rows = AttentionRows(layer, torch.arange(probe.length), pattern, visible_keys(probe.real))
        mean = averaged(CATALOGUE[name], rows, probe).mean(0)
        found |= {HeadIndex(layer, head): value for head, value in enumerate(mean.tolist())}
    return found


@pytest.mark.parametrize(
    "name", ["previous_token", "duplicate_token", "first_token", "current_token", "induction"]
)
def test_each_role_is_found(case: tuple[Handwired, Probe], name: str) -> None:
    built, probe = case
    found = scores(built, probe, name)
    head = built.roles[name]
    assert found[head] == pytest.approx(1, abs=1e-6)
    same = {"previous_token": built.roles.get("anti_copy")}
    for role, other in built.roles.items():
        alike = role == name or other == same.get(name)
        assert (found[other] > (CATALOGUE[name].threshold or 0)) <= (
            alike or name == "current_token"  # where a match is missing, heads rest on themselves
        )


def test_the_uniform_head_spreads(case: tuple[Handwired, Probe]) -> None:
    built, probe = case
    i = torch.arange(1, probe.length).float()
    head = built.roles["uniform"]
    assert scores(built, probe, "normalised_entropy")[head] == pytest.approx(1, abs=1e-5)
    mean = (1 / (i + 1)).mean().item()
    assert scores(built, probe, "previous_token")[head] == pytest.approx(mean, abs=1e-6)


def test_the_induction_pair_predicts_the_repetition(case: tuple[Handwired, Probe]) -> None:
    built, probe = case
    with torch.no_grad():
        logits = built.model(probe.tokens).logits
    start = probe.length - N
    assert logits[:, start:-1].argmax(-1).equal(probe.tokens[:, start + 1 :])
    raised = logits[:, start:-1].gather(-1, probe.tokens[:, start + 1 :, None])
    torch.testing.assert_close(raised, torch.full_like(raised, built.gain), atol=1e-4, rtol=0)


def test_probes_can_be_drawn_for_it() -> None:
    probe = repeated_tokens(handwired_gpt2(), length=10, batch=4)
    assert probe.tokens.shape == (4, 20)
