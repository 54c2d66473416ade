"""Circuits against transformer-lens and against explicit products; prints JSON ratios of one run.

Random weights: GPT-2 small, and a llama of 24 layers x 16 query heads with 4 key/value heads.
Composition and singular values of every head; numbers are compared while they are timed. The
explicit product is timed on a few heads and scaled, since all of them would take an hour.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.models.hf import HFModel

EXPLICIT_HEADS = 2


def gpt2_small() -> Any:
    """GPT-2 small with random weights."""
    return GPT2LMHeadModel(GPT2Config())


def grouped_llama() -> Any:
    """A llama of 24 x 16 heads in groups of four.

    Narrow, since transformer-lens copies both factors for every pair of heads: 77 GB at
    d_model 1024 and d_head 64.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=4,
        )
    )


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Shortest of some runs, in seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def peak_growth(work: Callable[[], Any]) -> float:
    """How much resident memory a call added at its highest, in MB (0 where nothing new)."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)


def compare_composition(model: HFModel) -> dict[str, float]:
    """All three modes over both libraries; ratio and largest difference."""
    found: dict[str, float] = {}
    ours_total = theirs_total = worst = 0.0
    for mode in ("Q", "K", "V"):
        ours, mine = timed(lambda mode=mode: hs.circuits.composition(model, mode, False), 2)
        theirs, other = timed(lambda mode=mode: model.bridge.all_composition_scores(mode))
        worst = max(worst, float(np.abs(mine.values - other.scores.detach().numpy()).max()))
        ours_total, theirs_total = ours_total + ours, theirs_total + theirs
        found[f"composition_{mode}_times_faster"] = round(theirs / ours, 1)
    found["composition_times_faster"] = round(theirs_total / ours_total, 1)
    found["composition_seconds"] = round(ours_total, 2)
    found["composition_largest_difference"] = worst
    return found


def compare_svd(model: HFModel) -> dict[str, float]:
    """SVD of all OV circuits: here, FactoredMatrix, explicit products."""
    factors = hs.circuits.ov(model, fold_norm=False)
    ours, mine = timed(factors.svd, 3)
    theirs, (_, S, _) = timed(lambda: model.bridge.OV.svd(), 2)
    heads = [(0, 0), (factors.layers[-1], factors.n_heads - 1)][:EXPLICIT_HEADS]
    one, _ = timed(lambda: [torch.linalg.svd(factors.explicit(head)) for head in heads])
    explicit = one / len(heads) * len(factors.layers) * factors.n_heads
    return {
        "ov_svd_seconds": round(ours, 2),
        "ov_svd_times_faster_than_factored_matrix": round(theirs / ours, 2),
        "ov_svd_times_faster_than_explicit": round(explicit / ours),
        "ov_svd_largest_difference": float((mine.S - S.detach()).abs().max()),
    }


def vocabulary_memory(model: HFModel) -> dict[str, float]:
    """Memory that the views of all heads add: bounded by blocks of the vocabulary."""
    factors, words = hs.circuits.ov(model), hs.circuits.Dictionary(model)
    seconds, _ = timed(lambda: hs.circuits.vocabulary_view(factors, words, 2, 5))
    added = peak_growth(lambda: hs.circuits.vocabulary_view(factors, words, 5, 10))
    whole = words.size**2 * 4 / 1e6
    return {
        "vocabulary_view_seconds": round(seconds, 2),
        "vocabulary_view_added_mb": added,
        "one_heads_token_matrix_mb": round(whole),
    }


def main() -> None:
    """Print one JSON object."""
    torch.manual_seed(0)
    results: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name, build in (("gpt2_small", gpt2_small), ("llama_24x16_gqa", grouped_llama)):
        model = HFModel.wrap(build().eval(), name=name)
        if model is None:
            raise SystemExit(f"{name} cannot be opened")
        with torch.no_grad():
            results[name] = {
                **compare_svd(model),
                **vocabulary_memory(model),
                **compare_composition(model),
            }
        print(json.dumps({name: results[name]}), flush=True)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
