"""How often the host waits for the device, on a device that counts it."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import headscope as hs
from headscope.ablation.engine import ReplaySource
from headscope.models.protocol import HeadModel, lacks
from tests.devices import standin

_SAME = ["previous_token", "induction", "duplicate_token", "current_token"]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    standin.install()
    with torch.autograd.set_multithreading_enabled(False):
        yield


@pytest.fixture(scope="module")
def model() -> HeadModel:
    """A model whose digest is known: it reads weights, and has nothing to do with a pass."""
    standin.install()
    model = hs.load("tiny-llama", device=standin.NAME)
    digest = model.digest()
    model.digest = lambda: digest
    return model


def waits(model: HeadModel, probe: hs.Probe, scorers: list[str], **options: int) -> int:
    """Of the second run: in the first one, some parts of the model are measured once for all."""
    hs.score(model, probe, scorers, **options)
    with standin.counting() as counted:
        hs.score(model, probe, scorers, **options)
    return counted.total()


def scorers_for(model: HeadModel, kind: str) -> list[str]:
    catalogue = hs.scorers.CATALOGUE.values()
    # Scorers of gradients take a pass of their own.
    shared = [one for one in catalogue if one.kind != "gradient" and one.probe is not None]
    meant = [one for one in shared if one.probe is not None and one.probe.name == kind]
    return [one.name for one in meant if not any(lacks(model, need) for need in one.needs)]


def test_as_many_for_one_scorer_as_for_all(model: HeadModel) -> None:
    probe = hs.probes.repeated_tokens(model, length=8, batch=3)
    every = scorers_for(model, "repeated_tokens")
    assert len(every) > 10
    few = waits(model, probe, ["previous_token", "direct_logit_attribution"])
    assert waits(model, probe, every) == few


@pytest.mark.parametrize("kind", ["repeated_tokens", "needle", "ioi", "text"])
def test_at_most_four_a_layer(model: HeadModel, kind: str) -> None:
    probe = {
        "repeated_tokens": lambda: hs.probes.repeated_tokens(model, length=8, batch=3),
        "needle": lambda: hs.probes.needle(model, lengths=64, depths=2, per_cell=1),
        "ioi": lambda: hs.probes.pairs(model, "ioi", batch=3),
        "text": lambda: hs.probes.text(model, ["The cat slept. The dog slept.", "One day"]),
    }[kind]()
    assert waits(model, probe, scorers_for(model, kind)) <= 4 * model.shape.n_layers


def test_chunks_and_batches_are_not_waited_for(model: HeadModel) -> None:
    probe = hs.probes.repeated_tokens(model, length=8, batch=4)
    whole = waits(model, probe, _SAME)
    assert waits(model, probe, _SAME, max_tokens_per_chunk=8) == whole
    assert waits(model, probe, _SAME, batch_size=2) == 2 * whole  # once per pass
    shortened = waits(model, hs.probes.repeated_tokens(model, length=4, batch=4), _SAME)
    assert shortened == whole


def test_a_probe_on_the_device_costs_one_copy_more(model: HeadModel) -> None:
    probe = hs.probes.repeated_tokens(model, length=8, batch=3)
    there = hs.score(model, probe.to(standin.NAME), _SAME)
    here = hs.score(model, probe, _SAME)
    for name in _SAME:
        assert (there[name].mean == here[name].mean).all()


def test_removing_heads_reads_no_head_by_itself(model: HeadModel) -> None:
    with standin.counting() as counted:
        hs.prune(model, ["L0H1"])
    assert counted.total() < 50 * model.shape.n_layers


def test_reading_all_weights_waits_for_a_layer_and_for_no_head(model: HeadModel) -> None:
    with standin.counting() as counted:
        hs.circuits.survey(model, tokens=16, paths=2)
    assert counted.total() <= 50 * model.shape.n_layers


def test_at_most_two_waits_for_a_stack_of_variants(
    model: HeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told apart from what a call costs once, by ablating few heads and all, in small stacks."""
    probe = hs.probes.pairs(model, "ioi", batch=3)
    monkeypatch.setattr("headscope.ablation.engine.CPU_STACK", 2 * probe.tokens.numel())
    monkeypatch.setattr("headscope.ablation.engine._ROWS", 1)  # each stack is read by itself
    stacks: list[int] = []
    run = ReplaySource.rows
    monkeypatch.setattr(
        ReplaySource, "rows", lambda self, many: (stacks.append(len(many)), run(self, many))[1]
    )

    def measured(heads: list[str]) -> tuple[int, int]:
        stacks.clear()
        with standin.counting() as counted:
            hs.ablate_heads(model, probe, hs.metrics.logit_difference, "mean", heads=heads)
        return counted.total(), len(stacks)

    every = [str(head) for head in model.shape.heads]
    measured(every)  # the engine is chosen once
    few, all_heads = measured(every[:2]), measured(every)
    assert all_heads[1] - few[1] >= 8
    assert all_heads[0] - few[0] <= 2 * (all_heads[1] - few[1])


def test_the_gpu_benchmark_runs_and_finds_equal_numbers() -> None:
    """Its logic, with small models on this device; what a GPU makes of it is measured there."""
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    specification = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert specification is not None
    assert specification.loader is not None
    benchmark = importlib.util.module_from_spec(specification)
    sys.modules["gpu_benchmark"] = benchmark  # dataclasses look their module up
    specification.loader.exec_module(benchmark)
    found = benchmark.main(["--small", "--device", standin.NAME, "--only", "llama"])
    items = found["items"]
    for what in ("scan", "ablation", "path patching", "decoding", "logit lens", "rows"):
        assert any(name.startswith(f"llama: {what}") for name in items)
    assert all(one["equal"] for one in items.values()), items
