"""Train one bundled model.

`python -m tools.train_bundled.train --model tiny-gpt2 --out DIR`
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .architectures import CONTEXT, NAMES, new_model
from .data import Mixture, Rows
from .evaluate import quick_figures
from .revive import revive
from .tokenizer import build_tokenizer, save_tokenizer


@dataclass(frozen=True)
class Growth:
    """First part of training: random groups out of ever more tokens.

    With few tokens in all, only looking back at the right place pays, so the two-layer circuit
    forms within some hundred steps; from then on a tenth more tokens at a time teach it to work
    for all. On the whole vocabulary at once the same takes many times as long.
    """

    length: int = 64
    start: int = 16
    factor: float = 1.1
    enough: float = 0.8
    """Running loss below which more tokens come in."""
    finished: float = 0.15
    """Running loss on all tokens at which this part ends."""
    most_steps: int = 6000


@dataclass(frozen=True)
class Stage:
    """A stretch of the second part, in which everything is learned together."""

    steps: int
    length: int
    mixture: Mixture
    tokens_per_step: int = 1536


@dataclass(frozen=True)
class Cycle:
    """Stages under one fall of the learning rate, from ``peak`` of the full rate to a thirtieth.

    Each one after the first starts from the stored 16-bit weights with a fresh optimizer, so that
    it can be run again on its own.
    """

    stages: tuple[Stage, ...]
    peak: float = 0.7
    revive: bool = False
    """Redraw the heads of the first layer that rest on BOS before this cycle."""

    def rate(self, done: float) -> float:
        """Share of the full rate: down along a cosine."""
        return self.peak * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))


TOGETHER = Cycle((Stage(900, 128, Mixture(0.3)), Stage(2700, CONTEXT, Mixture(0.25))))


@dataclass(frozen=True)
class Plan:
    """How long and how fast one model is trained."""

    growth: Growth = Growth()
    cycles: tuple[Cycle, ...] = (TOGETHER,)
    learning_rate: float = 3e-3
    embedding_factor: float = 3.3
    position_factor: float = 0.33
    warmup: int = 50
    tokens_per_step: int = 1536
    checkpoint_every: int = 200


AGAIN = Cycle((Stage(2500, CONTEXT, Mixture(0.25)),), peak=0.6)
RECALL = Cycle((Stage(3000, CONTEXT, Mixture(0.1)),), peak=0.5)
PAIRS_FIRST = Mixture(0.8, (0.1, 0.1, 0.1, 0.7))
PAIRS_ALONG = Mixture(0.35, (0.1, 0.4, 0.1, 0.4), facts_share=0.7, near_share=0.9)
# Two tokens together must name a value, in short rows first. Without the second cycle's redrawn
# heads the first layer has one working head, and facts whose keys share a word stay mixed up.
PAIRS = Cycle((Stage(1800, 64, PAIRS_FIRST), Stage(2400, CONTEXT, PAIRS_ALONG, 2048)), peak=0.8)
REVIVED = Cycle(
    (
        Stage(3000, 64, Mixture(0.85, (0.1, 0.1, 0.1, 0.7))),
        Stage(2400, CONTEXT, PAIRS_ALONG, 2048),
    ),
    peak=0.9,
    revive=True,
)
PLANS = {
    "tiny-gpt2": Plan(cycles=(TOGETHER, AGAIN, AGAIN, RECALL, PAIRS, REVIVED)),
    "tiny-llama": Plan(),
}


def weighted_loss(model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Next-token loss, averaged with the weights of the predicted tokens."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    by_token = weights[:, 1:]
    asked = by_token > 0  # the rest needs no logits
    logits = model.get_output_embeddings()(hidden[asked])
    losses = cross_entropy(logits, ids[:, 1:][asked], reduction="none")
    return (losses * by_token[asked]).sum() / by_token.sum()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights rounded to 16 bits, with a config by which they load as 32 bits."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.half().save_pretrained(folder)
    model.float().load_state_dict(kept)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


def optimizer_of(model: PreTrainedModel, plan: Plan) -> torch.optim.Optimizer:
    """AdamW; token embeddings move faster, position embeddings slower than the rest."""
    factors = {"embed_tokens": plan.embedding_factor, "wte": plan.embedding_factor}
    factors["wpe"] = plan.position_factor
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for label, parameter in model.named_parameters():
        factor = next((times for part, times in factors.items() if part in label), 1.0)
        groups.setdefault(factor, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": found, "factor": factor} for factor, found in groups.items()],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )


@dataclass
class Run:
    """A model in training."""

    name: str
    model: PreTrainedModel
    rows: Rows
    plan: Plan
    out: Path
    seed: int
    step: int = 0
    loss: float = 7.0

    def __post_init__(self) -> None:
        """Make the optimizer and start the clock."""
        self.optimizer = optimizer_of(self.model, self.plan)
        self.started = time.monotonic()

    def rng(self) -> Random:
        """Random numbers of this step."""
        return Random(f"train {self.seed} {self.step}")

    def take(self, ids: torch.Tensor, weights: torch.Tensor, rate: float) -> None:
        """One step, with a checkpoint and figures before it where they are due."""
        if self.step % self.plan.checkpoint_every == 0:
            save(self.model, self.out / "checkpoints" / f"step-{self.step:06d}")
            self.report()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * group["factor"] * rate
        loss = weighted_loss(self.model, ids, weights)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss = 0.95 * self.loss + 0.05 * loss.item()
        self.step += 1

    def report(self) -> None:
        """Print a few figures."""
        figures = quick_figures(self.model, self.rows)
        shown = " ".join(f"{key} {value:.2f}" for key, value in figures.items())
        seconds = time.monotonic() - self.started
        print(
            f"{self.name} step {self.step} {seconds:.0f}s loss {self.loss:.3f} {shown}", flush=True
        )

    def grow(self) -> None:
        """First part: groups out of ever more tokens."""
        growth, plan = self.plan.growth, self.plan
        known, count = growth.start, plan.tokens_per_step // growth.length
        everything = len(self.rows.ids)
        while self.step < growth.most_steps:
            if self.loss < growth.enough and known < everything:
                known = min(everything, int(known * growth.factor) + 1)
                self.loss += 0.15  # so that the new tokens are seen before the next come
            if known == everything and self.loss < growth.finished:
                return
            ids, weights = self.rows.groups(self.rng(), count, growth.length, known)
            self.take(ids, weights, min(1.0, (self.step + 1) / plan.warmup))

    def mix(self, cycle: Cycle) -> None:
        """Second part: everything together, in longer rows."""
        total, done = sum(stage.steps for stage in cycle.stages), 0
        for stage in cycle.stages:
            count = stage.tokens_per_step // stage.length
            for _ in range(stage.steps):
                ids, weights = self.rows.batch(self.rng(), count, stage.length, stage.mixture)
                self.take(ids, weights, cycle.rate(done / total))
                done += 1


def train(name: str, out: Path, seed: int, plan: Plan, cycle: int = 0) -> PreTrainedModel:
    """Train one model; writes checkpoints, the model and its tokenizer.

    Args:
        name: which model.
        out: folder of the results.
        seed: of weights and data.
        plan: how to train.
        cycle: first cycle to run; above 0 it goes on from the weights in ``out``.
    """
    tokenizer = build_tokenizer(CONTEXT)
    rows = Rows(tokenizer)
    run = Run(name, new_model(name, len(tokenizer), rows.bos, seed), rows, plan, out, seed)
    if cycle:
        last = max((out / "checkpoints").glob("step-*"))
        run.step = int(last.name.removeprefix("step-"))
    else:
        run.grow()
    for number in range(cycle, len(plan.cycles)):
        run = run if number == 0 else _going_on(run, plan.cycles[number].revive)
        run.mix(plan.cycles[number])
        run.report()
        save(run.model, out / "checkpoints" / f"step-{run.step:06d}")
        save(run.model, out)
    save_tokenizer(out, CONTEXT)
    return run.model


def _going_on(run: Run, redraw: bool) -> Run:
    """The run from its stored weights, with a fresh optimizer."""
    stored = type(run.model).from_pretrained(run.out, dtype=torch.float32)
    if redraw:
        heads = revive(stored, run.rows, run.seed)
        print(f"{run.name} redrew heads {heads} of the first layer", flush=True)
    return Run(run.name, stored, run.rows, run.plan, run.out, run.seed, run.step)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=NAMES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    parser.add_argument("--cycle", type=int, default=0, help="go on from DIR with this cycle")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train(args.model, args.out, args.seed, PLANS[args.model], args.cycle)


if __name__ == "__main__":
    main()
