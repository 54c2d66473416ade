"""Train small transformers and state-space models to recall, and write docs/mixers.md.

    python -m tools.mixers

Takes about six minutes on one core, and no curve more than three. The same seeds give the same
curves on the same machine.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from headscope import ablation, probes
from headscope.metrics import answer_probability

PAGE = Path(__file__).parents[1] / "docs" / "mixers.md"
VOCAB, WIDTH, BATCH = 17, 64, 64


Draw = Callable[[int, int], probes.Probe]  # from a number of texts and a seed

TASKS: dict[str, Draw] = {
    "associative recall": lambda batch, seed: probes.recall(
        range(1, 9), range(9, 17), batch=batch, seed=seed
    ),
    "tree recall": lambda batch, seed: probes.tree_recall(
        range(3, 15), 1, 2, nodes=4, batch=batch, seed=seed
    ),
}


def transformer() -> nn.Module:
    """Make a Llama of two layers with one head each.

    Its initialisation is wide (0.1), so that attention is not flat at the start and the second head
    has something of the first to build on.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def state_space() -> nn.Module:
    """Make a Mamba of two layers."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        state_size=16,
        use_mambapy=False,
    )
    return MambaForCausalLM(config)


@dataclass(frozen=True)
class Learner:
    """A model and how it is trained.

    Attributes:
        build: makes the model.
        rate: of learning.
        steps: of training.
    """

    build: Callable[[], nn.Module]
    rate: float
    steps: int


LEARNERS = {
    "transformer": Learner(transformer, 1e-3, 1000),
    "state space": Learner(state_space, 3e-3, 1000),
}


@dataclass(frozen=True)
class Point:
    """A model after some steps.

    Attributes:
        step: of training.
        accuracy: share of new texts that it answers.
        restored: probability of the answer that comes back where a mixer's clean output is put at
            a mark, in the layer where most does; by mark.
    """

    step: int
    accuracy: float
    restored: dict[str, float]


def curve(draw: Draw, learner: Learner, steps: int | None = None, seed: int = 0) -> list[Point]:
    """Train a model and look at it eight times on the way.

    Args:
        draw: the texts that it learns; the loss is at the answer alone.
        learner: the model and its rate.
        steps: of training; default: the learner's.
        seed: of weights and texts.
    """
    steps = learner.steps if steps is None else steps
    torch.manual_seed(seed)
    module = learner.build()
    optimiser = torch.optim.AdamW(
        module.parameters(), learner.rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    points = []
    for step in range(steps + 1):
        if step % max(1, steps // 8) == 0:
            points.append(_look(draw, module, step))
        probe = draw(BATCH, 1 + seed * 1_000_000 + step)
        logits = module(input_ids=probe.tokens).logits[:, -1]
        loss = nn.functional.cross_entropy(logits, probe.targets[:, -1])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
    return points


def _look(draw: Draw, module: nn.Module, step: int) -> Point:
    module.eval()
    probe = draw(BATCH, 0)
    with torch.no_grad():
        answers = module(input_ids=probe.tokens).logits[:, -1].argmax(-1)
    grid = ablation.restore(module, probe, answer_probability)
    mixer = grid.mean[grid.labels[0].index("mixer_out")].max(0)
    module.train()
    right = (answers == probe.targets[:, -1]).double().mean()
    return Point(step, float(right), dict(zip(grid.labels[2], mixer.tolist(), strict=True)))


_HEAD = """\
# Training curves of recall

<!-- Written by `python -m tools.mixers`. -->

How two small models learn to recall: a Llama of two layers with one head each, and a Mamba of two
layers, both {width} wide. They are trained on fresh texts of `hs.probes.recall` (4 pairs of 8 keys
and 8 values) and `hs.probes.tree_recall` (trees of 4 nodes), with the loss on the answer alone.

*Accuracy* is the share of {batch} new texts that the model answers correctly. The other columns
come from `hs.ablation.restore`. The corrupt text has one token replaced; one mixer gets its clean
output back at one mark, and the column shows how much of the answer's probability returns, for the
layer where most does. A model that stores pairs in place (as induction does) recovers the answer
at the pair's own tokens, before the query. A model that looks pairs up when asked (as a pointer
does) recovers it at the query alone. [Exact models](howto/exact-models.md) shows both mechanisms,
compiled.

## What they learned

*In place* is the largest probability that comes back at a token of the asked pair, and *at the
query* the one at the last token, both at the end of training. Where the first is at least half of
the second, the pair is stored in place.

{summary}

Each curve is one seed: an example, not a comparison of architectures. Guessing one of the four
values in the text gives 0.25 in associative recall. The transformer starts from a wide
initialisation (0.1, where the usual one is 0.02) and learns at a rate of 0.001: at the Mamba's rate
of 0.003 it stayed near that guess with either initialisation.
"""
_PAIR = ("key", "value", "parent", "child")


def summary(curves: dict[tuple[str, str], list[Point]]) -> str:
    """Return a table of what every model does at the end of its training."""
    lines = [
        "| task | model | accuracy | in place | at the query | the pair is |",
        "|---|---|--:|--:|--:|---|",
    ]
    for (task, model), points in curves.items():
        end = points[-1]
        place = max(value for mark, value in end.restored.items() if mark in _PAIR)
        query = end.restored["query"]
        kind = "stored in place" if place >= query / 2 else "looked up at the query"
        lines.append(
            f"| {task} | {model} | {end.accuracy:.2f} | {place:.2f} | {query:.2f} | {kind} |"
        )
    return "\n".join(lines)


def page(curves: dict[tuple[str, str], list[Point]]) -> str:
    """Return the page, with a table for every task and model."""
    parts = [_HEAD.format(width=WIDTH, batch=BATCH, summary=summary(curves))]
    for (task, model), points in curves.items():
        marks = list(points[0].restored)
        parts += [
            f"## {task.capitalize()}: {model}\n",
            f"| step | accuracy | {' | '.join(marks)} |",
            "|--:" * (2 + len(marks)) + "|",
            *(
                f"| {one.step} | {one.accuracy:.2f} | "
                + " | ".join(f"{round(one.restored[mark], 2) + 0.0:.2f}" for mark in marks)
                + " |"
                for one in points
            ),
            "",
        ]
    return "\n".join(parts)


def main() -> None:
    """Train both models on both tasks and write the page."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curves = {
            (task, model): curve(draw, learner)
            for task, draw in TASKS.items()
            for model, learner in LEARNERS.items()
        }
    PAGE.write_text(page(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
