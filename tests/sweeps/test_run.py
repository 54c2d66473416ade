"""Sweeps give the numbers of the functions that they stand for; resume, retry and stop."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.models import bundled
from headscope.sweeps import read, run_sweep, status
from headscope.sweeps.plan import Chunk, Plan
from headscope.sweeps.run import Bench, Benches, OnFinished, Stop, Work, inline
from tests.sweeps.support import REPEATED, config


def test_single_heads_equal_ablate_heads_and_whole_passes(tmp_path: Path) -> None:
    run_sweep(config(edits=["zero", "mean"]), tmp_path)
    results = read(tmp_path)
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=6, batch=3)
    for edit in ("zero", "mean"):
        found = results.scores(edit=edit)
        expected = hs.ablate_heads(model, probe, hs.metrics.loss, edit)
        np.testing.assert_allclose(found.per_example, expected.per_example, atol=1e-6)
        np.testing.assert_allclose(found.p_value, expected.p_value, rtol=1e-3)
        assert found.provenance.weight_digest == model.digest()
        low, high = found.interval()
        assert (low <= found.mean).all()
        assert (found.mean <= high).all()
    with torch.no_grad():  # the slow, obvious way
        clean = hs.metrics.loss(model.forward(probe.tokens), probe)
        edited = model.forward(probe.tokens, edits=(hs.edits.zero("L1H2"),))
    effect = (hs.metrics.loss(edited, probe) - clean).numpy()
    np.testing.assert_allclose(results.scores(edit="zero").per_example[1, 2], effect, atol=1e-5)


def test_groups_and_curves_equal_the_functions_for_them(tmp_path: Path) -> None:
    sets = [
        {"name": "pair", "heads": ["L0H1", "L2H0"], "arrange": "together"},
        {"name": "curve", "heads": ["L2H0", "L0H1", "L1H3"], "arrange": "cumulative"},
    ]
    run_sweep(config(edits=["mean"], sets=sets), tmp_path)
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=6, batch=3)
    curve = hs.ablate_cumulatively(model, probe, hs.metrics.loss, ["L2H0", "L0H1", "L1H3"])
    found = read(tmp_path).effects("curve")
    assert found.axes == ("draw", "heads")
    assert found.labels == (("0",), ("0", "1", "2", "3"))
    np.testing.assert_allclose(found.per_example[0], curve.per_example, atol=1e-6)
    np.testing.assert_allclose(found.unedited, curve.unedited, atol=1e-6)
    pair = read(tmp_path).effects("pair").per_example[0, 0]
    np.testing.assert_allclose(pair, curve.per_example[2], atol=1e-6)


def test_positions_references_and_scaling(tmp_path: Path) -> None:
    ioi = {"kind": "ioi", "batch": 4}
    edits = [
        {"method": "zero", "positions": "end"},
        {"method": "scale", "factor": 0.5, "positions": "end"},
        {"method": "mean", "reference": "other"},
    ]
    metrics = [{"metric": "logit_difference"}]
    sets = [{"name": "some", "heads": ["L1H1", "L2H2"]}]
    wanted = config(
        probes=[ioi], edits=edits, metrics=metrics, sets=sets,
        references=[REPEATED | {"name": "other"}],
    )  # fmt: skip
    run_sweep(wanted, tmp_path)
    results, model = read(tmp_path), hs.load()
    probe = hs.probes.pairs(model, "ioi", batch=4)
    other = hs.probes.repeated_tokens(model, length=6, batch=3)
    end = probe.mark("end")
    cases = {
        "zero@end": hs.ablate_heads(
            model, probe, hs.metrics.logit_difference, "zero", ["L1H1", "L2H2"], positions="end"
        ),
        "scale0.5@end": hs.ablate_heads(
            model,
            probe,
            hs.metrics.logit_difference,
            lambda heads: hs.edits.scale(heads, 0.5, positions=end),
            ["L1H1", "L2H2"],
        ),
        "mean~other": hs.ablate_heads(
            model, probe, hs.metrics.logit_difference, "mean", ["L1H1", "L2H2"], reference=other
        ),
    }
    for edit, expected in cases.items():
        found = results.scores(edit=edit)
        np.testing.assert_allclose(found.mean, expected.mean, atol=1e-5, err_msg=edit)
        assert np.isnan(found.mean[0]).all()


def test_a_rerun_computes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    measure = Bench.measure

    def counting(self: Bench, plan: Plan, chunk: Chunk) -> object:
        counted.append(chunk.id)
        return measure(self, plan, chunk)

    monkeypatch.setattr(Bench, "measure", counting)
    wanted = config()
    first = run_sweep(wanted, tmp_path, shard=(1, 3))
    assert (first.done, first.total, first.compacted) == (1, 1, False)
    assert status(tmp_path).done == 1
    assert not read(tmp_path).complete
    assert np.isnan(read(tmp_path).scores().mean[1:]).all()
    last = run_sweep(wanted, tmp_path)
    assert (last.done, last.total, last.compacted) == (3, 3, True)
    assert len(counted) == len(set(counted)) == 3
    again = run_sweep(wanted, tmp_path)
    assert again.compacted
    assert len(counted) == 3


def test_another_config_needs_another_folder(tmp_path: Path) -> None:
    run_sweep(config(), tmp_path)
    with pytest.raises(InputError, match="differs in: edits"):
        run_sweep(config(edits=["mean"]), tmp_path)
    assert run_sweep(config(batch_size=2), tmp_path).compacted  # how, not what


def test_a_chunk_that_fails_is_recorded_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    measure = Bench.measure

    def failing(self: Bench, plan: Plan, chunk: Chunk) -> object:
        if chunk.id == plan.chunks[1].id:
            tried.append(chunk.id)
            raise RuntimeError("out of\nluck")
        return measure(self, plan, chunk)

    monkeypatch.setattr(Bench, "measure", failing)
    outcome = run_sweep(config(), tmp_path)
    assert len(tried) == 1  # what cannot pass is not tried again
    assert (outcome.done, outcome.total, outcome.compacted) == (2, 3, False)
    assert list(outcome.failed.values()) == ["RuntimeError: out of luck"]
    found = status(tmp_path)
    assert (found.done, found.pending) == (2, 0)
    assert found.failed == outcome.failed
    monkeypatch.setattr(Bench, "measure", measure)
    assert run_sweep(config(), tmp_path).compacted
    assert status(tmp_path).failed == {}


def test_a_chunk_that_fails_twice_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, tries = Bench.measure, iter(range(100))

    def shaky(self: Bench, plan: Plan, chunk: Chunk) -> object:
        if next(tries) < 2:
            raise OSError("the disk was away")
        return measure(self, plan, chunk)

    monkeypatch.setattr(Bench, "measure", shaky)
    assert run_sweep(config(), tmp_path).compacted


def test_other_weights_end_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_sweep(config(), tmp_path, shard=(1, 3))
    of = Bench.of

    def retrained(*arguments: object) -> Bench:
        bench = of(*arguments)
        with torch.no_grad():
            bench.model.module.transformer.ln_f.weight.mul_(1.5)
        return bench

    monkeypatch.setattr(Bench, "of", retrained)
    with pytest.raises(InputError, match="not those that this sweep was planned with"):
        run_sweep(config(), tmp_path)
    assert status(tmp_path).done == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_chunk(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)

    def interrupted(work: Work, chunks: Sequence[Chunk], stop: Stop, finished: OnFinished) -> None:
        def then(chunk: Chunk) -> None:
            os.kill(os.getpid(), number)
            finished(chunk)

        inline(work, chunks, stop, then)

    outcome = run_sweep(config(), tmp_path, executor=interrupted, catch_signals=True)
    assert outcome.stopped
    assert (outcome.done, outcome.total) == (1, 3)
    assert signal.getsignal(number) is before
    assert run_sweep(config(), tmp_path).compacted


def test_a_second_interrupt_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Benches.measure

    def interrupted(self: Benches, plan: Plan, chunk: Chunk) -> object:
        if chunk.id == plan.chunks[1].id:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, plan, chunk)

    monkeypatch.setattr(Benches, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config(), tmp_path, catch_signals=True)
    assert status(tmp_path).done == 1


def test_shards_make_the_table_of_one_run(tmp_path: Path) -> None:
    states = bundled.checkpoints("tiny-gpt2")[-2:]
    wanted = config(models=[{"model": "tiny-gpt2", "checkpoints": list(states)}], sets=SOME)
    whole = run_sweep(wanted, tmp_path / "whole").store
    for index in (2, 1):
        outcome = run_sweep(wanted, tmp_path / "shards", shard=(index, 2))
    assert outcome.compacted
    assert whole.table_file.read_bytes() == outcome.store.table_file.read_bytes()
    found = read(tmp_path / "shards")
    labels = [model.label for model in found.plan.models]
    assert all("@" in label for label in labels)
    table = found.table(model=labels[0])
    assert list(table) == ["zero:loss"]
    assert table["zero:loss"].provenance.revision == labels[0].split("@")[1]


SOME = [{"name": "some", "heads": ["L0H0", "L2H3"]}]
