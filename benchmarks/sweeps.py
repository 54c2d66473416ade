"""What sweeping costs over the bare ablation. See workers.py for what a second worker brings.

python benchmarks/sweeps.py [--prompts N] [--layers N]: random-weight GPT-2 small with some layers
and few tokens, all heads by themselves, mean ablation. ``store_share``: time spent on writing
parts, compaction and looking into the folder, of the whole run. ``over_bare``: the sweep's time
over that of one ``hs.ablate_heads`` call: what cutting into chunks costs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import report
from transformers import AutoModelForCausalLM, GPT2Config

import headscope as hs
from headscope.sweeps import SweepConfig
from headscope.sweeps.run import Benches, inline, make_plan
from headscope.sweeps.store import Store


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        torch.manual_seed(0)
        # Few tokens: it is the blocks that are swept.
        sizes = GPT2Config(vocab_size=1024, n_layer=given.layers, initializer_range=0.1)
        module = AutoModelForCausalLM.from_config(sizes).eval()
        module.save_pretrained(place)
        config = sweep_of([str(place)], given.prompts)
        results = {"inline": against_bare(config, place, Path(folder), given)}
    report("sweeps", results)


def sweep_of(places: list[str], prompts: int) -> SweepConfig:
    """All heads of some models, on prompts of about a hundred tokens."""
    return SweepConfig.model_validate(
        {
            "name": "benchmark",
            "models": [{"model": place, "name": f"m{i}"} for i, place in enumerate(places)],
            "probes": [{"kind": "repeated_tokens", "length": 50, "batch": prompts}],
            "edits": ["mean"],
            "metrics": ["loss"],
        }
    )


def against_bare(
    config: SweepConfig, place: Path, folder: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """The sweep against one call, in turn, the model loaded in both."""
    model = hs.load(place)
    probe = hs.probes.repeated_tokens(model, length=50, batch=given.prompts)
    benches = Benches(config)
    plan = make_plan(config, benches=benches)
    bare, swept, stored = [], [], []
    for number in range(given.rounds + 1):
        started = time.perf_counter()
        hs.ablate_heads(model, probe, hs.metrics.loss, "mean", progress=False)
        middle = time.perf_counter()
        spent = sweep_once(plan, benches, Store.create(folder / f"run{number}"), config)
        ended = time.perf_counter()
        if number:  # the first round warms up
            bare.append(middle - started)
            swept.append(ended - middle)
            stored.append(spent / (ended - middle))
    return {
        "cells": plan.n_cells,
        "chunks": len(plan.chunks),
        "bare_seconds": statistics.median(bare),
        "sweep_seconds": statistics.median(swept),
        "over_bare": round(statistics.median(swept) / statistics.median(bare), 3),
        "store_share": round(statistics.median(stored), 5),
        "limit": 0.03,
    }


def sweep_once(plan: Any, benches: Benches, store: Store, config: SweepConfig) -> float:
    """Run all chunks and compact; seconds that the store took."""
    from headscope.sweeps.run import Stop, Work, manifest

    spent = [0.0]

    def timed(action: Callable[[], object]) -> Any:
        started = time.perf_counter()
        result = action()
        spent[0] += time.perf_counter() - started
        return result

    class Timed(Store):
        """Counts the time of every look and every write."""

        def has(self, chunk: str) -> bool:
            return bool(timed(lambda: super(Timed, self).has(chunk)))

        def commit(self, chunk: str, rows: Any) -> None:
            timed(lambda: super(Timed, self).commit(chunk, rows))

    watched = Timed(store.path)
    timed(lambda: store.begin(manifest(config, plan)))
    inline(Work(config, plan, watched, benches), plan.chunks, Stop(), lambda _: None)
    timed(lambda: store.compact(plan))
    return spent[0]


if __name__ == "__main__":
    main()
