"""What a plan will cost: cells, passes through the model, and time measured on one cell."""

import time
from dataclasses import dataclass, replace

from headscope.sweeps.bench import Benches
from headscope.sweeps.config import SweepConfig
from headscope.sweeps.plan import Chunk, Plan


@dataclass(frozen=True)
class Estimate:
    """Cost of a plan.

    Attributes:
        cells: rows of the table: sets of heads that are edited, with each metric.
        chunks: files that are written.
        examples: edited examples, over all sets; metrics share them.
        passes: the same in whole passes: a cell whose first head is in layer l of n counts
            (n - l) / n an example; each chunk adds its clean run.
        seconds: on this machine, one process; extrapolated by passes from ``timed``.
        timed: what was measured to tell.
    """

    cells: int
    chunks: int
    examples: int
    passes: float
    seconds: float
    timed: str


def estimate(config: SweepConfig, plan: Plan, benches: Benches) -> Estimate:
    """Count, and time one cell of the model at hand (the last one planned)."""
    chunk = plan.chunks[-1]
    study = plan.studies[chunk.study]
    edited = [cell for cell in chunk.cells if cell.heads] or list(chunk.cells)
    one = replace(chunk, cells=(edited[len(edited) // 2],))
    few = replace(chunk, cells=tuple((edited * 9)[:9]))
    benches.measure(plan, one)  # reference values and proofs, once a study
    alone, several = (_seconds(benches, plan, part) for part in (one, few))
    # Eight more cells cost this much more: the clean run is in both.
    per_pass = max(several - alone, 0.05 * several) / (8 * _share(plan, one) * study.examples)
    passes = sum(passes_of(plan, part) for part in plan.chunks)
    model = plan.models[study.model].label
    return Estimate(
        cells=plan.n_cells,
        chunks=len(plan.chunks),
        examples=sum(len(part.cells) * plan.studies[part.study].examples for part in plan.chunks),
        passes=passes,
        seconds=passes * per_pass,
        timed=f"one cell of {model} ({study.edit.label} of {one.cells[0].set!r} on "
        f"{study.examples} examples of {study.probe!r}), measured: "
        f"{1000 * per_pass * _share(plan, one) * study.examples:.1f} ms",
    )


def passes_of(plan: Plan, chunk: Chunk) -> float:
    """Whole passes that a chunk amounts to, one example each."""
    examples = plan.studies[chunk.study].examples
    return examples * (1 + _share(plan, chunk))


def _share(plan: Plan, chunk: Chunk) -> float:
    """Cells in units of whole passes: only layers from the first edited one on are run."""
    layers = plan.models[plan.model_of(chunk)].layers
    starts = [min(cell.heads).layer if cell.heads else layers for cell in chunk.cells]
    return sum((layers - start) / layers for start in starts) or 1.0


def _seconds(benches: Benches, plan: Plan, chunk: Chunk) -> float:
    """Shortest of three."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        benches.measure(plan, chunk)
        taken.append(time.perf_counter() - started)
    return min(taken)
