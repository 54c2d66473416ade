"""Train small transformers and state-space models to recall, and write docs/mixers.md.

    python -m tools.mixers

Takes about two minutes on one core. The same seeds give the same curves on the same machine.
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
VOCAB, WIDTH, BATCH, RATE = 33, 64, 64, 3e-3


@dataclass(frozen=True)
class Task:
    """Texts to learn from.

    Attributes:
        draw: ``(batch, seed) -> probe``.
        steps: of training.
    """

    draw: Callable[[int, int], probes.Probe]
    steps: int


TASKS = {
    "associative recall": Task(
        lambda batch, seed: probes.recall(range(1, 17), range(17, 33), batch=batch, seed=seed),
        400,
    ),
    "tree recall": Task(
        lambda batch, seed: probes.tree_recall(range(3, 15), 1, 2, nodes=4, batch=batch, seed=seed),
        400,
    ),
}


def transformer() -> nn.Module:
    """A Llama of two layers with one head each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def state_space() -> nn.Module:
    """A Mamba of two layers."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        state_size=16,
        use_mambapy=False,
    )
    return MambaForCausalLM(config)


MODELS = {"transformer": transformer, "state space": state_space}


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


def curve(task: Task, build: Callable[[], nn.Module], steps: int, seed: int = 0) -> list[Point]:
    """Train a model and look at it eight times on the way.

    Args:
        task: what it learns; the loss is at the answer alone.
        build: makes the model.
        steps: of training.
        seed: of weights and texts.
    """
    torch.manual_seed(seed)
    module = build()
    optimiser = torch.optim.AdamW(module.parameters(), RATE, weight_decay=0.1)
    points = []
    for step in range(steps + 1):
        if step % max(1, steps // 8) == 0:
            points.append(_look(task, module, step))
        probe = task.draw(BATCH, 1 + seed * 1_000_000 + step)
        logits = module(input_ids=probe.tokens).logits[:, -1]
        loss = nn.functional.cross_entropy(logits, probe.targets[:, -1])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
    return points


def _look(task: Task, module: nn.Module, step: int) -> Point:
    module.eval()
    probe = task.draw(BATCH, 0)
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
layers, both {width} wide. They are trained on fresh texts of `hs.probes.recall` (4 pairs of 16 keys
and 16 values) and `hs.probes.tree_recall` (trees of 4 nodes), with the loss on the answer alone.

*Accuracy* is the share of {batch} new texts that the model answers correctly. The other columns
come from `hs.ablation.restore`. The corrupt text has one token replaced; one mixer gets its clean
output back at one mark, and the column shows how much of the answer's probability returns, for the
layer where most does. A model that stores pairs in place recovers the answer at the value, before
the query. A model that looks pairs up recovers it at the query alone. [Exact
models](howto/exact-models.md) shows both mechanisms, compiled.

Each curve is one seed: an example, not a comparison of architectures. Guessing one of the four
values in the text gives 0.25 in associative recall.
"""


def page(curves: dict[tuple[str, str], list[Point]]) -> str:
    """Return the page, with a table for every task and model."""
    parts = [_HEAD.format(width=WIDTH, batch=BATCH)]
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curves = {
            (task, model): curve(TASKS[task], build, TASKS[task].steps)
            for task in TASKS
            for model, build in MODELS.items()
        }
    PAGE.write_text(page(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
