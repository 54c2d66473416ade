"""Ablation against the usual loop: one transformer-lens hooked forward per head.

GPT-2 small with random weights, 10 prompts of 100 tokens, logit difference at the end, mean
ablation. headscope runs all 144 heads; of the loop every LOOP_EVERY-th head is run and its time
multiplied, which is stated. Ratios are of medians of one run, both sides warm, same threads.

    python benchmarks/ablation.py [rounds] [headscope's heads: every n-th]     # prints JSON
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from support import gpt2_small, report

import headscope as hs
from headscope.base.statistics import rank_correlation

PROMPTS, LENGTH, LAYERS, HEADS, WIDTH, VOCAB = 10, 100, 12, 12, 768, 50257
LOOP_EVERY = 13  # coprime to 12: the sample walks through the layers and the heads
GRID_POSITIONS = range(5, 100, 10)
BLOCK = 12 * WIDTH * WIDTH  # multiplications of one token with the weights of one block
ATTENTION = LENGTH * WIDTH / BLOCK  # of queries, keys and values, over the visible half


def probe_of_random_tokens() -> hs.Probe:
    """Prompts with an answer and a foil at the end, and a corrupt pair."""
    generator = torch.Generator().manual_seed(0)
    tokens, other = torch.randint(0, VOCAB, (2, PROMPTS, LENGTH), generator=generator)
    probe = hs.probes.from_tokens(tokens)
    end = torch.zeros_like(probe.real)
    end[:, -1] = True
    marks = {"end": end}
    for position in GRID_POSITIONS:
        marks[str(position)] = torch.zeros_like(end)
        marks[str(position)][:, position] = True
    answers, foils = torch.randint(0, VOCAB, (2, PROMPTS, 1), generator=generator)
    probe = replace(
        probe,
        targets=torch.where(end, answers, -1),
        foils=torch.where(end, foils, -1),
        marks=marks,
    )
    return replace(probe, corrupt=replace(probe, tokens=other))


def timed(command: Callable[[], Any], rounds: int) -> tuple[Any, float, float]:
    """Result, median seconds and median processor seconds."""
    clock, processor = [], []
    for _ in range(rounds):
        started, used = time.perf_counter(), time.process_time()
        result = command()
        clock.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return result, median(clock), median(processor)


def hooked(z: torch.Tensor, hook: Any, *, at: Any, value: torch.Tensor) -> torch.Tensor:
    """Set z at (position, head) to a value, in the form in which hook_z carries it."""
    shaped = z.view(*z.shape[:2], HEADS, -1)
    shaped[:, at[0], at[1]] = value
    return z


@torch.no_grad()
def loop(bridge: Any, probe: hs.Probe, edits: list[tuple[int, Any, torch.Tensor]]) -> np.ndarray:
    """The metric of every edit, one hooked forward each."""
    values = []
    for layer, at, value in edits:
        hook = (f"blocks.{layer}.attn.hook_z", partial(hooked, at=at, value=value))
        logits = bridge.run_with_hooks(probe.tokens, fwd_hooks=[hook])
        values.append(hs.metrics.logit_difference(logits, probe).double().numpy())
    return np.stack(values)


def matmul_rate(rounds: int = 20) -> float:
    """Floating-point operations per second of the machine's matrix product."""
    a, b = torch.randn(PROMPTS * LENGTH, WIDTH), torch.randn(WIDTH, 4 * WIDTH)
    _, seconds, _ = timed(lambda: a @ b, rounds)
    return 2 * a.numel() * b.shape[1] / seconds


def suffix_flops(heads: list[hs.HeadIndex]) -> float:
    """Operations of the matrix products that ablating these heads cannot do without.

    Layer l: projection and MLP; layers above: everything; the last: keys and values, and the rest
    at the position read.
    """
    blocks = 0.0
    for layer, _ in heads:
        if layer == LAYERS - 1:
            blocks += 9 / 12 / LENGTH
        else:
            above = LAYERS - 2 - layer
            blocks += 9 / 12 + above * (1 + ATTENTION) + 2 / 12 + 10 / 12 / LENGTH
    return 2 * blocks * BLOCK * PROMPTS * LENGTH + 2 * len(heads) * PROMPTS * WIDTH * VOCAB


def main(rounds: int, every: int) -> dict[str, Any]:
    """All comparisons."""
    model = hs.load(gpt2_small())
    bridge, probe, metric = model.bridge, probe_of_random_tokens(), hs.metrics.logit_difference
    means = hs.ablation.head_means(model, probe)
    heads = list(model.shape.heads)[::every]
    sample = list(model.shape.heads)[::LOOP_EVERY]
    hs.ablate_heads(model, probe, metric, "mean", "L11H0")  # warm, and the engine is tried once
    clean = loop(bridge, probe, [(0, (slice(0, 0), 0), torch.zeros(1))])

    def against(at: Any, positions: str | None) -> dict[str, Any]:
        """All heads by headscope, the sample by the loop."""
        edits = [(i, (at, j), means[i][j]) for i, j in sample]
        theirs, slow, slow_cpu = timed(lambda: loop(bridge, probe, edits), rounds)
        ours, fast, fast_cpu = timed(
            lambda: hs.ablate_heads(model, probe, metric, "mean", heads, positions=positions),
            rounds,
        )
        shared = [i for i, head in enumerate(sample) if head in heads]
        found = np.stack([ours.per_example[sample[i]] for i in shared])
        worst = np.abs(found - (theirs - clean)[shared]).max() / np.abs(clean).max()
        per_head = slow / len(sample), fast / len(heads)
        return {
            "loop_seconds_per_head": per_head[0],
            "headscope_seconds": fast,
            "headscope_heads": len(heads),
            "times_faster": per_head[0] / per_head[1],
            "times_less_processor": slow_cpu / len(sample) / (fast_cpu / len(heads)),
            "largest_difference_of_effects_over_metric": float(worst),
        }

    before = matmul_rate()
    everywhere = against(slice(None), None)
    bound = suffix_flops(heads) / median([before, matmul_rate()])
    whole = everywhere["headscope_seconds"]
    # One head of the last layer costs nearly nothing beyond the clean pass and the proofs.
    _, fixed, _ = timed(lambda: hs.ablate_heads(model, probe, metric, "mean", "L11H0"), rounds)
    everywhere["times_the_suffix_flops_at_matmul_rate"] = whole / bound
    everywhere["the_same_without_clean_pass_and_proofs"] = (whole - fixed) / bound
    return {
        "all_positions": everywhere,
        "last_position": against(-1, "end"),
        "patching_grid": grid(model, probe, rounds),
        "attribution": estimate(model, probe, heads, rounds, everywhere["loop_seconds_per_head"]),
    }


def grid(model: Any, probe: hs.Probe, rounds: int) -> dict[str, Any]:
    """Layer x position patching of all heads of a layer; some cells of it by the loop."""
    corrupt, metric = probe.corrupt or probe, hs.metrics.logit_difference
    donors = hs.ablation.head_values(model, corrupt.tokens)
    marks = [str(position) for position in GRID_POSITIONS]
    cells = [(i, GRID_POSITIONS[(7 * i) % len(marks)]) for i in range(LAYERS)]
    edits = [(i, (p, slice(None)), donors[i][:, p]) for i, p in cells]
    theirs, slow, slow_cpu = timed(lambda: loop(model.bridge, probe, edits), rounds)
    ours, fast, fast_cpu = timed(
        lambda: hs.patch_activations(model, probe, metric, ("layer", "position"), positions=marks),
        rounds,
    )
    found = np.stack([ours.per_example[i, marks.index(str(p))] for i, p in cells])
    worst = np.abs(found - (theirs - ours.unedited)).max() / np.abs(ours.unedited).max()
    n = LAYERS * len(marks)
    return {
        "cells": n,
        "loop_seconds_per_cell": slow / len(cells),
        "headscope_seconds": fast,
        "times_faster": slow / len(cells) / (fast / n),
        "times_less_processor": slow_cpu / len(cells) / (fast_cpu / n),
        "largest_difference_of_effects_over_metric": float(worst),
    }


def estimate(
    model: Any, probe: hs.Probe, heads: list[hs.HeadIndex], rounds: int, loop_seconds: float
) -> dict[str, Any]:
    """Attribution of all heads against the loop, and its rank correlation with the effects."""
    metric = hs.metrics.logit_difference
    found, seconds, _ = timed(lambda: hs.estimate_heads(model, probe, metric), rounds)
    exact = hs.ablate_heads(model, probe, metric, "mean", heads)
    known = ~np.isnan(exact.mean)
    return {
        "headscope_seconds": seconds,
        "times_faster_than_the_loop_over_all_heads": LAYERS * HEADS * loop_seconds / seconds,
        "rank_correlation_with_effects": rank_correlation(found.mean[known], exact.mean[known]),
    }


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    report("ablation", main(*(arguments + [3, 1][len(arguments) :])))
