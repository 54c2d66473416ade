"""Circuits against transformer-lens and against explicit products; prints JSON ratios of one run.

Random weights: GPT-2 small, and a llama of 24 layers x 16 query heads with 4 key/value heads.
Composition and singular values of every head; numbers are compared while they are timed, works
take turns and the shortest time of each counts. The explicit product is timed on one head and
multiplied.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from support import report
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.models.hf.model import HFModel

# Composition is compared on a narrow llama: transformer-lens copies both factors for every pair of
# heads, which takes 77 GB at the width at which singular values are compared.
WIDE, NARROW = 1024, 256


def gpt2_small() -> Any:
    """GPT-2 small with random weights."""
    return GPT2LMHeadModel(GPT2Config())


def grouped_llama(width: int) -> Any:
    """A llama of 24 x 16 heads in groups of four."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=4,
        )
    )


def race(rounds: int, **works: Callable[[], Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Shortest time of each work in seconds, taking turns, and its last result."""
    best, results = dict.fromkeys(works, float("inf")), {}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            results[name] = work()
            best[name] = min(best[name], time.perf_counter() - start)
    return best, results


def peak_growth(work: Callable[[], Any]) -> float:
    """How much resident memory a call added at its highest, in MB (0 where nothing new)."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)


def compare_composition(model: HFModel) -> dict[str, float]:
    """All three modes of both libraries; ratios and the largest difference."""
    found: dict[str, float] = {}
    total = {"ours": 0.0, "theirs": 0.0}
    worst = 0.0
    for mode in ("Q", "K", "V"):
        seconds, results = race(
            2,
            ours=lambda mode=mode: hs.circuits.composition(model, mode, fold_norm=False),
            theirs=lambda mode=mode: model.bridge.all_composition_scores(mode),
        )
        difference = results["ours"].values - results["theirs"].scores.detach().numpy()
        worst = max(worst, float(np.abs(difference).max()))
        total = {name: total[name] + seconds[name] for name in total}
        found[f"composition_{mode}_times_faster"] = round(seconds["theirs"] / seconds["ours"], 1)
    found["composition_times_faster"] = round(total["theirs"] / total["ours"], 1)
    found["composition_seconds"] = round(total["ours"], 2)
    found["composition_largest_difference"] = worst
    return found


def compare_svd(model: HFModel) -> dict[str, float]:
    """SVD of all OV circuits: here, FactoredMatrix, explicit products."""
    factors = hs.circuits.ov(model, fold_norm=False)
    heads = factors.n_heads * len(factors.layers)
    seconds, results = race(
        4,
        ours=factors.svd,
        theirs=lambda: model.bridge.OV.svd(),
        one_explicit=lambda: torch.linalg.svd(factors.explicit((0, 1))),
    )
    difference = results["ours"].S - results["theirs"][1].detach()
    ratios = {name: seconds[name] / seconds["ours"] for name in ("theirs", "one_explicit")}
    return {
        "ov_svd_seconds": round(seconds["ours"], 2),
        "ov_svd_times_faster_than_factored_matrix": round(ratios["theirs"], 2),
        "ov_svd_times_faster_than_explicit": round(ratios["one_explicit"] * heads),
        "ov_svd_largest_difference": float(difference.abs().max()),
    }


def vocabulary_memory(model: HFModel) -> dict[str, float]:
    """Memory that the views of all heads add: bounded by blocks of the vocabulary."""
    factors, words = hs.circuits.ov(model), hs.circuits.Dictionary(model)
    start = time.perf_counter()
    added = peak_growth(lambda: hs.circuits.vocabulary_view(factors, words, 5, 10))
    return {
        "vocabulary_view_seconds": round(time.perf_counter() - start, 2),
        "vocabulary_view_added_mb": added,
        "one_heads_token_matrix_mb": round(words.size**2 * 4 / 1e6),
    }


def main() -> None:
    """Print one JSON object."""
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    cases: dict[str, tuple[Callable[[], Any], tuple[Callable[[HFModel], dict[str, float]], ...]]]
    cases = {
        "gpt2_small": (gpt2_small, (compare_svd, vocabulary_memory, compare_composition)),
        f"llama_24x16_gqa_{WIDE}": (lambda: grouped_llama(WIDE), (compare_svd,)),
        f"llama_24x16_gqa_{NARROW}": (lambda: grouped_llama(NARROW), (compare_composition,)),
    }
    for name, (build, comparisons) in cases.items():
        model = HFModel.wrap(build().eval(), name=name)
        if model is None:
            raise SystemExit(f"{name} cannot be opened")
        with torch.no_grad():
            results[name] = {}
            for compare in comparisons:
                results[name] |= compare(model)
    report("circuits", results)


if __name__ == "__main__":
    main()
