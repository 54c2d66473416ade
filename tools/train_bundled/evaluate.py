"""Evaluate a bundled model: `python -m tools.train_bundled.evaluate FOLDER`."""

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from . import examples, measure
from .architectures import CONTEXT
from .data import Rows


def quick_figures(model: PreTrainedModel, rows: Rows) -> dict[str, float]:
    """A few figures from little data, to watch training by."""
    ids = examples.repeated(rows, 8, 50, seed=1)
    pattern = measure.patterns(model, ids)
    _, second = measure.half_losses(model, ids)
    fact_right, _ = measure.answers(model, examples.fact_prompts(rows, 20, CONTEXT, seed=1))
    short_right, _ = measure.answers(model, examples.fact_prompts(rows, 20, 64, seed=1))
    name_right, margins = measure.answers(model, examples.name_prompts(rows, 50, seed=1))
    return {
        "previous": measure.previous_token_scores(pattern).max().item(),
        "induction": measure.induction_scores(pattern).max().item(),
        "second": second,
        "facts64": short_right.float().mean().item(),
        "facts256": fact_right.float().mean().item(),
        "names": (margins > 0).float().mean().item(),
        "names_top": name_right.float().mean().item(),
    }


def best(scores: torch.Tensor, count: int) -> list[dict[str, Any]]:
    """The highest cells of a `[layer head]` score."""
    values, places = scores.flatten().topk(count)
    heads = scores.shape[1]
    return [
        {"head": f"L{place // heads}H{place % heads}", "score": round(value, 4)}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]


def ablation_figures(
    model: PreTrainedModel, ids: torch.Tensor, induction: torch.Tensor, top: int
) -> dict[str, Any]:
    """Loss of the second copy without the `top` induction heads, and without random others."""
    layers, heads = induction.shape
    places = induction.flatten().topk(top).indices.tolist()
    chosen = [(place // heads, place % heads) for place in places]
    others = [(i, j) for i in range(layers) for j in range(heads) if (i, j) not in chosen]
    with measure.without_heads(model, chosen):
        ablated = measure.half_losses(model, ids)[1]
    rng = Random("evaluate ablation")
    draws = []
    for _ in range(20):
        with measure.without_heads(model, rng.sample(others, top)):
            draws.append(measure.half_losses(model, ids)[1])
    return {
        "heads": [f"L{i}H{j}" for i, j in chosen],
        "second_half_loss": round(ablated, 3),
        "random_heads_mean": round(sum(draws) / len(draws), 3),
        "random_heads_median": round(sorted(draws)[len(draws) // 2], 3),
        "random_heads_max": round(max(draws), 3),
        "random_draws": len(draws),
    }


def figures(model: PreTrainedModel, rows: Rows, seed: int = 1000) -> dict[str, Any]:
    """All figures of the model card."""
    ids = examples.repeated(rows, 64, 50, seed)
    pattern = measure.patterns(model, ids)
    induction = measure.induction_scores(pattern)
    first, second = measure.half_losses(model, ids)
    prompts = examples.fact_prompts(rows, 500, CONTEXT, seed)
    right, _ = measure.answers(model, prompts)
    by_depth = {
        f"{low / 4:.2f}-{(low + 1) / 4:.2f}": round(
            right[torch.tensor([int(prompt.depth * 4) == low for prompt in prompts])]
            .float()
            .mean()
            .item(),
            3,
        )
        for low in range(4)
    }
    name_right, margins = measure.answers(model, examples.name_prompts(rows, 500, seed))
    story_pattern = measure.patterns(model, examples.stories(rows, 32, 128, seed))
    return {
        "seed": seed,
        "previous_token_on_random": best(measure.previous_token_scores(pattern), 4),
        "previous_token_on_text": best(measure.previous_token_scores(story_pattern), 4),
        "induction": best(induction, 8),
        "repeated_tokens": {
            "first_half_loss": round(first, 3),
            "second_half_loss": round(second, 3),
        },
        "ablation": [ablation_figures(model, ids, induction, top) for top in (1, 2, 3, 4)],
        "held_out_facts": {"accuracy": round(right.float().mean().item(), 4), "by_depth": by_depth},
        "held_out_name_pairs": {
            "indirect_object_over_subject": round((margins > 0).float().mean().item(), 4),
            "indirect_object_is_likeliest": round(name_right.float().mean().item(), 4),
            "mean_logit_difference": round(margins.mean().item(), 3),
        },
    }


def main() -> None:
    """The command line: prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.folder)
    found = figures(model, Rows(AutoTokenizer.from_pretrained(args.folder)), args.seed)
    checkpoints = sorted((args.folder / "checkpoints").glob("step-*"))
    if checkpoints:
        found["checkpoints"] = {}
        rows = Rows(AutoTokenizer.from_pretrained(args.folder))
        for folder in checkpoints:
            quick = quick_figures(
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), rows
            )
            found["checkpoints"][folder.name] = {
                key: round(value, 3) for key, value in quick.items()
            }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
