"""Metrics that share runs give the numbers that each gives by itself."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.ablation.engine import RecordedBatch
from headscope.ablation.run import Measurement, Placer
from headscope.base.options import RunOptions
from headscope.edits import Variant
from headscope.metrics import as_metric
from tests.ablation.helpers import model_of, probe_of, whole_pass


def biggest(logits: torch.Tensor, probe: hs.Probe) -> torch.Tensor:
    """A metric of one's own: it reads every position."""
    return logits.amax((1, 2))


END, LATE = hs.metrics.logit_difference, hs.metrics.kl_divergence.at("late")


def measured(measurement: Measurement) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    placer, heads = Placer(measurement, "zero"), measurement.model.shape.heads

    def variants(chosen: slice, batch: RecordedBatch) -> list[Variant]:
        place = placer.place(chosen, batch)
        placer.prove(batch, place, heads)
        return [(), *((place([head]),) for head in heads)]

    edited, clean = measurement.measure_all(variants, len(heads) + 1, "test")
    return edited, clean, placer.checks


@pytest.mark.parametrize(
    ("family", "metrics"),
    [
        ("gpt2", (END, LATE)),
        ("gpt2", (END, biggest, LATE)),
        ("gemma2", (LATE, hs.metrics.loss)),
        ("bloom", (END, biggest, LATE)),
    ],
)
def test_together_as_alone_and_as_whole_passes(family: str, metrics: tuple[Any, ...]) -> None:
    model, probe = model_of(family), probe_of("left")
    measurement = Measurement.of(model, probe, metrics[0], RunOptions(3), others=metrics[1:])
    together, clean, checks = measured(measurement)
    assert together.shape == (len(metrics), 1 + len(model.shape.heads), len(probe))
    where = 1 + model.shape.heads.index(hs.HeadIndex(1, 0))
    with torch.no_grad():
        logits = model.forward(probe.tokens, real=probe.real)
        zeroed = model.forward(probe.tokens, real=probe.real, edits=(hs.edits.zero("L1H0"),))
    for number, metric in enumerate(metrics):
        alone, unedited, known = measured(Measurement.of(model, probe, metric, RunOptions(3)))
        np.testing.assert_allclose(together[number], alone[0], atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(clean[number], unedited[0], atol=1e-6, rtol=1e-6)
        assert known.keys() == checks.keys()
        more = (logits,) if "clean" in as_metric(metric).needs else ()
        slow = as_metric(metric)(zeroed, probe, *more).numpy()
        np.testing.assert_allclose(together[number, where], slow, atol=2e-5, rtol=2e-5)


def test_each_variant_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = model_of("gpt2"), probe_of()
    run: list[int] = []
    stacks = RecordedBatch._stacks

    def counting(self: RecordedBatch, variants: list[Variant]) -> Any:
        run.append(len(variants))
        return stacks(self, variants)

    monkeypatch.setattr(RecordedBatch, "_stacks", counting)
    measurement = Measurement.of(model, probe, END, others=(LATE, hs.metrics.loss))
    measurement.measure_all(lambda *_: [()] * 5, 5, "test")
    assert run == [5]


def test_examples_without_answers_are_nan_in_every_batch() -> None:
    model, probe = model_of("gpt2"), probe_of()
    some = torch.tensor([False, False, True, True])[:, None]
    probe = replace(
        probe,
        targets=torch.where(some, probe.targets, -1),
        foils=torch.where(some, probe.foils, -1),
    )
    expected = whole_pass(model, probe, [hs.edits.zero("L1H0")], END)
    assert np.isnan(expected).tolist() == [True, True, False, False]
    for size in (1, 2, 4):
        measurement = Measurement.of(
            model, probe, END, RunOptions(size), others=(hs.metrics.kl_divergence,)
        )
        (edited, divergence), _ = measurement.measure_all(
            lambda *_: [(hs.edits.zero("L1H0"),)], 1, "test"
        )
        np.testing.assert_allclose(edited[0], expected, atol=1e-5)
        assert np.isnan(divergence[0]).tolist() == [True, True, False, False]
        scores = hs.ablate_heads(model, probe, END, "zero", ["L1H0"], batch_size=size)
        assert scores.n[1, 0] == 2
