"""Metrics on logits written by hand."""

from dataclasses import replace
from math import exp, log

import pytest
import torch

import headscope as hs
from headscope.metrics import as_metric, normalised_effect

# Softmax of log 1, log 2, log 5 is 1/8, 2/8, 5/8.
ROW = [log(1.0), log(2.0), log(5.0)]
FLAT = [0.0, 0.0, 0.0]


def probe_of(targets: list[list[int]], foils: list[list[int]] | None = None) -> hs.Probe:
    tokens = torch.zeros(len(targets), len(targets[0]), dtype=torch.long)
    probe = hs.probes.from_tokens(tokens, targets=torch.tensor(targets))
    return probe if foils is None else replace(probe, foils=torch.tensor(foils))


LOGITS = torch.tensor([[ROW, FLAT], [FLAT, ROW]])
PROBE = probe_of([[1, -1], [2, 0]], [[2, -1], [0, 2]])


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("logit_difference", log(2 / 5), (0 + log(1 / 5)) / 2),
        ("answer_log_prob", log(2 / 8), (log(1 / 3) + log(1 / 8)) / 2),
        ("answer_probability", 2 / 8, (1 / 3 + 1 / 8) / 2),
        ("answer_rank", 1.0, (0 + 2) / 2),
        ("accuracy", 0.0, 0.0),  # of three equal logits the lowest token wins, not token 2
        ("loss", -log(2 / 8), -(log(1 / 3) + log(1 / 8)) / 2),
    ],
)
def test_by_hand(name: str, first: float, second: float) -> None:
    metric = getattr(hs.metrics, name)
    assert metric(LOGITS, PROBE).tolist() == pytest.approx([first, second], abs=1e-6)
    low, high = metric.bounds
    assert low is None or first >= low
    assert high is None or first <= high


def test_accuracy_of_a_tie_goes_to_the_lowest_token() -> None:
    assert hs.metrics.accuracy(torch.zeros(1, 1, 3), probe_of([[0]])).tolist() == [1.0]


def test_loss_per_token() -> None:
    per_token = hs.metrics.loss.by_position(LOGITS, PROBE)
    assert per_token[0, 0] == pytest.approx(-log(2 / 8))
    assert torch.isnan(per_token[0, 1])
    assert per_token[1].tolist() == pytest.approx([log(3), log(8)])


def test_kl_divergence_by_hand() -> None:
    clean, edited = torch.tensor([[ROW]]), torch.tensor([[FLAT]])
    expected = sum(p * log(p * 3) for p in (1 / 8, 2 / 8, 5 / 8))
    found = hs.metrics.kl_divergence(edited, probe_of([[1]]), clean)
    assert found.tolist() == pytest.approx([expected], abs=1e-6)
    assert hs.metrics.kl_divergence(clean, probe_of([[1]]), clean).tolist() == [0.0]
    with pytest.raises(hs.HeadscopeError, match="clean="):
        hs.metrics.kl_divergence(edited, probe_of([[1]]))


def test_kl_reads_real_positions_where_no_target_is() -> None:
    probe = hs.probes.from_tokens(
        torch.zeros(1, 3, dtype=torch.long),
        torch.tensor([[False, True, True]]),
        targets=torch.full((1, 3), -1),
    )
    assert hs.metrics.kl_divergence.reads(probe).tolist() == [[False, True, True]]


def test_marks_choose_the_positions() -> None:
    end = torch.tensor([[False, False], [False, True]])
    probe = replace(PROBE, marks={"end": end})
    found = hs.metrics.loss.at("end")(LOGITS, probe)
    assert torch.isnan(found[0])
    assert found[1] == pytest.approx(log(8))
    with pytest.raises(hs.HeadscopeError, match="no mark 'needle'"):
        hs.metrics.loss.at("needle").reads(probe)
    unanswered = replace(probe, marks={"end": PROBE.targets < 0})
    with pytest.raises(hs.HeadscopeError, match="nothing to read"):
        hs.metrics.loss.at("end").reads(unanswered)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(hs.HeadscopeError, match="no foils"):
        hs.metrics.logit_difference.reads(probe_of([[1]]))
    with pytest.raises(hs.HeadscopeError, match="nothing to read"):
        hs.metrics.loss.reads(probe_of([[-1, -1]]))
    whole = as_metric(lambda logits, probe: logits.sum())
    with pytest.raises(hs.HeadscopeError, match="one number per example"):
        whole(LOGITS, PROBE)


def test_half_precision_is_read_in_single() -> None:
    half = hs.metrics.answer_probability(LOGITS.bfloat16(), PROBE)
    assert half.dtype == torch.float32
    assert half[0] == pytest.approx(exp(log(2 / 8)), rel=1e-2)


def test_normalised_effect() -> None:
    clean, corrupt = torch.tensor([4.0, 1.0]), torch.tensor([0.0, 1.0])
    found = normalised_effect(torch.tensor([1.0, 1.0]), clean, corrupt)
    assert found[0] == 0.25
    assert torch.isnan(found[1])
    assert normalised_effect(clean, clean, corrupt)[0] == 1
    assert normalised_effect(corrupt, clean, corrupt)[0] == 0
