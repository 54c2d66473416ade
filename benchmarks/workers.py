"""What a second Ray worker brings to a sweep, in steady state; prints JSON.

    python benchmarks/workers.py > benchmarks/results/workers.json    # eleven minutes on two cores
    python benchmarks/workers.py --layers 2 --prompts 2               # the script's own logic

One model of GPT-2's width with few tokens, all heads by themselves, mean ablation, with one worker
and with two, in turns, each worker on one thread. Every worker's first chunk loads the model and
validates the edit, so it is counted as start, with Ray's own; ``times_of_one_worker`` is what is
left: the work of all later chunks, in seconds of the run with one worker, per second that the two
workers had for it, times two. Gaps between chunks and the wait of the worker that ends first are in
it. Tables must be equal to the byte.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the workers: one thread each, whatever the machine has.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from support import report
from transformers import AutoModelForCausalLM, GPT2Config

from headscope.sweeps import RayExecutor, SweepConfig, cluster, run_sweep
from headscope.sweeps.run import OnFinished, Stop, Work

_LOG = "HEADSCOPE_BENCHMARK_LOG"


class Timed(cluster.Worker):
    """Worker that writes down when its chunks begin and end, and their processor time."""

    def run(self, chunk: str) -> str:
        """Run one chunk."""
        begun, before = time.time(), time.process_time()
        failed = super().run(chunk)
        line = [os.getpid(), chunk, begun, time.time(), time.process_time() - before]
        with open(os.environ[_LOG], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return failed


@dataclass(frozen=True)
class Run:
    """What the workers of one run wrote down.

    Attributes:
        begun: when the executor was called.
        workers: chunks of each worker in order: id, begin, end, processor time.
    """

    begun: float
    workers: list[list[tuple[str, float, float, float]]]

    @property
    def seconds(self) -> float:
        """Seconds of the run, starts included."""
        return self.ended - self.begun

    @property
    def ended(self) -> float:
        """When the last chunk was saved."""
        return max(chunks[-1][2] for chunks in self.workers)

    @property
    def start(self) -> float:
        """Seconds until the last worker was through its first chunk."""
        return max(chunks[0][2] for chunks in self.workers) - self.begun

    @property
    def steady(self) -> dict[str, float]:
        """Seconds of each chunk but the workers' first ones, from end to end."""
        return {
            chunk[0]: chunk[2] - before[2]
            for chunks in self.workers
            for before, chunk in pairwise(chunks)
        }

    @property
    def available(self) -> float:
        """Seconds that workers had after their first chunks, over all workers."""
        return sum(self.ended - chunks[0][2] for chunks in self.workers)

    @property
    def cpu(self) -> dict[str, float]:
        """Processor seconds of each chunk but the workers' first ones."""
        return {chunk[0]: chunk[3] for chunks in self.workers for chunk in chunks[1:]}

    @property
    def idle(self) -> float:
        """Seconds that workers waited: between chunks, and at the end for the other."""
        gaps = sum(
            chunk[1] - before[2] for chunks in self.workers for before, chunk in pairwise(chunks)
        )
        return gaps + sum(self.ended - chunks[-1][2] for chunks in self.workers)


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cluster.Worker = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        config = sweep(Path(folder) / "model", given)
        runs: dict[int, list[Run]] = {1: [], 2: []}
        tables = set()
        for number in range(given.rounds):
            for workers, done in runs.items():
                out = Path(folder) / f"{workers}-{number}"
                done.append(one_run(config, out, workers))
                tables.add((out / "table.parquet").read_bytes())
                say(f"{workers} workers: {done[-1].seconds:.1f} s, start {done[-1].start:.1f} s")
    if len(tables) > 1:
        raise SystemExit("tables of one and of two workers differ")
    report("workers", results(runs, given) | {"tables_equal_to_the_byte": True})


def sweep(place: Path, given: argparse.Namespace) -> SweepConfig:
    """All heads of one model by themselves, six in a chunk."""
    torch.manual_seed(0)
    sizes = GPT2Config(
        vocab_size=1024, n_layer=given.layers, initializer_range=0.1, bos_token_id=0, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(sizes).eval().save_pretrained(place)
    return SweepConfig.model_validate(
        {
            "name": "workers",
            "models": [{"model": str(place), "name": "gpt2-width"}],
            "probes": [{"kind": "repeated_tokens", "length": 50, "batch": given.prompts}],
            "edits": ["mean"],
            "metrics": ["loss"],
            "chunk": 6,
        }
    )


def one_run(config: SweepConfig, out: Path, workers: int) -> Run:
    """Run the sweep with some workers."""
    log = Path(f"{out}.log")
    os.environ[_LOG] = str(log)
    begun: list[float] = []

    def executor(work: Work, chunks: Any, stop: Stop, finished: OnFinished) -> None:
        begun.append(time.time())
        RayExecutor(workers)(work, chunks, stop, finished)

    run_sweep(config, out, executor=executor, progress=False)
    by_process: dict[int, list[tuple[str, float, float, float]]] = {}
    for line in log.read_text("utf-8").splitlines():
        process, *facts = json.loads(line)
        by_process.setdefault(process, []).append(tuple(facts))
    return Run(begun[0], list(by_process.values()))


def results(runs: dict[int, list[Run]], given: argparse.Namespace) -> dict[str, Any]:
    """Ratio of every round, and what it is made of."""
    ratios, cpu = [], []
    for one, two in zip(runs[1], runs[2], strict=True):
        work = sum(one.steady.get(chunk, seconds) for chunk, seconds in two.steady.items())
        ratios.append(len(two.workers) * work / two.available)
        shared = one.cpu.keys() & two.cpu.keys()
        cpu.append(sum(two.cpu[c] for c in shared) / sum(one.cpu[c] for c in shared))
    return {
        "times_of_one_worker": round(statistics.median(ratios), 3),
        "rounds": [round(ratio, 3) for ratio in ratios],
        "goal": 1.85,
        "threads_of_a_worker": 1,
        "chunks": sum(len(chunks) for chunks in runs[1][0].workers),
        "layers": given.layers,
        "prompts": given.prompts,
        "cpu_seconds_of_two_over_one": round(statistics.median(cpu), 3),
        "runs": {
            f"{workers} worker{'s' * (workers > 1)}": {
                "seconds": round(statistics.median(run.seconds for run in done), 2),
                "start_seconds": round(statistics.median(run.start for run in done), 2),
                "idle_seconds": round(statistics.median(run.idle for run in done), 2),
            }
            for workers, done in runs.items()
        },
    }


def say(line: str) -> None:
    """Report progress on standard error."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
