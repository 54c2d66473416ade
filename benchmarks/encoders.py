"""Encoders, images and encoder-decoders: a scan against one plain pass, ablation against a loop.

Random weights of the shapes of BERT base, ViT-B/16 and T5 small. The scan reads row scores of all
heads; the plain pass is the model's own, on fused attention. The loop zeroes one head after
another by a hook on what its attention's output projection is given; it is run for some heads and
its time multiplied. Scans and plain passes alternate, both warm; ratios are of medians. Times are
those of the processor (all threads together), which other work on the machine changes less than
those of the clock.

``at_most``, of images, is the ratio that the count of operations allows where every ablation is
computed exactly: a head in block ``l`` of ``n`` needs the MLP of block ``l``, the blocks above, and
of the last one what the positions read need. The loop needs all ``n``.

    python benchmarks/encoders.py [rounds] [every n-th head of the loop] [layers]     # prints JSON

``python benchmarks/encoders.py 1 24 2`` takes about two minutes on a quiet core.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from support import report
from torch import Tensor, nn

import headscope as hs

SCORES = ["entropy", "attention_distance"]
MOST, LEAST = 1.15, 3.0


@dataclass(frozen=True)
class Case:
    """A model with what it is run on.

    Attributes:
        module: of transformers.
        inputs: of one batch.
        at: position whose logits are read; None: the model gives one row for each example.
        stacks: names of its stacks.
    """

    module: Any
    inputs: dict[str, Tensor]
    at: int | None
    stacks: tuple[str, ...]


def bert(layers: int) -> Case:
    """Masked language modelling of 8 texts of 128 tokens, asked for one of them."""
    config = transformers.BertConfig(num_hidden_layers=layers, initializer_range=0.05)
    tokens = torch.randint(1000, 30000, (8, 128), generator=torch.Generator().manual_seed(0))
    module = transformers.BertForMaskedLM(config)
    return Case(module, {"input_ids": tokens}, 64, ("",))


def vit(layers: int) -> Case:
    """Eight images of 197 positions, classified."""
    config = transformers.ViTConfig(
        num_hidden_layers=layers, initializer_range=0.05, num_labels=1000
    )
    pixels = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    module = transformers.ViTForImageClassification(config)
    return Case(module, {"pixel_values": pixels}, None, ("vision",))


def t5(layers: int) -> Case:
    """Eight sources of 128 tokens, and targets of 32."""
    layers = max(1, layers // 2)
    config = transformers.T5Config(
        num_layers=layers, num_decoder_layers=layers, decoder_start_token_id=0
    )
    draw = torch.Generator().manual_seed(0)
    source, target = (torch.randint(5, 32000, (8, n), generator=draw) for n in (128, 32))
    module = transformers.T5ForConditionalGeneration(config)
    inputs = {"input_ids": source, "decoder_input_ids": target}
    return Case(module, inputs, -1, ("encoder", "decoder", "cross"))


CASES = {"bert": bert, "vit": vit, "t5": t5}


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """Result, and seconds of the processor."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def alternating(works: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each, warm."""
    for work in works:
        work()
    times = [[seconds(work)[1] for work in works] for _ in range(rounds)]
    return [median(one) for one in zip(*times, strict=True)]


# Share of a block of 12 d^2 products a token that the MLP and the output projection take, and that
# keys and values take.
_BEHIND, _KEYS = 9 / 12, 2 / 12


def at_most(layers: int) -> float:
    """How much faster than the loop an exact ablation of all heads can be, by operations."""
    needed = [_BEHIND + (layers - 2 - at) + _KEYS for at in range(layers - 1)]
    return layers**2 / sum(needed) if needed else float("inf")


@torch.no_grad()
def log_probability(case: Case, answers: Tensor) -> np.ndarray:
    """Of the answers, by the module itself."""
    logits = case.module(**case.inputs).logits
    logits = logits if case.at is None else logits[:, case.at]
    chosen = logits.double().log_softmax(-1).gather(1, answers[:, None])
    return chosen.squeeze(1).numpy()


@torch.no_grad()
def loop(case: Case, view: Any, heads: list[Any], answers: Tensor) -> np.ndarray:
    """The metric with each head's output at 0, one hooked pass each."""
    found, width = [], view.shape.d_head
    for layer, head in heads:

        def zero(_module: nn.Module, given: tuple[Tensor], head: int = head) -> tuple[Tensor]:
            z = given[0].clone()
            z[..., head * width : (head + 1) * width] = 0
            return (z,)

        hook = view.parts.projection(layer).register_forward_pre_hook(zero)
        found.append(log_probability(case, answers))
        hook.remove()
    return np.stack(found)


def measured(name: str, rounds: int, every: int, layers: int) -> dict[str, Any]:
    """Both comparisons of one model."""
    torch.manual_seed(0)
    case = CASES[name](layers)
    case.module.eval()
    model = hs.load(case.module)
    answers = torch.arange(8) + 5
    probe = probe_of(case, answers)

    def plain() -> None:
        with torch.no_grad():
            case.module(**case.inputs)

    once, scan = alternating(
        [plain, lambda: hs.score(model, probe, SCORES, progress=False)], rounds
    )
    results: dict[str, Any] = {
        "plain_pass_seconds": once, "scan_seconds": scan, "scan_over_pass": scan / once,
    }  # fmt: skip
    clean = log_probability(case, answers)
    for stack in case.stacks:
        view = model.stack(stack) if len(case.stacks) > 1 else model
        results[f"ablation {stack}".strip()] = ablation(case, view, probe, answers, clean, every)
    return results


def probe_of(case: Case, answers: Tensor) -> hs.Probe:
    """The inputs, with the answer at the position that is read."""
    if case.at is None:
        return hs.probes.from_batch(case.inputs, labels=answers)
    length = case.inputs.get("decoder_input_ids", case.inputs["input_ids"]).shape[1]
    targets = torch.full((8, length), -1)
    targets[:, case.at] = answers
    if "decoder_input_ids" in case.inputs:
        return hs.probes.from_batch(case.inputs, targets=targets)
    return hs.probes.from_tokens(case.inputs["input_ids"], targets=targets)


def ablation(
    case: Case, view: Any, probe: hs.Probe, answers: Tensor, clean: np.ndarray, every: int
) -> dict[str, Any]:
    """All heads of a stack by headscope, some by the loop."""
    heads = list(view.shape.heads)
    sample = heads[::every]
    metric = hs.metrics.answer_log_prob
    theirs, slow = seconds(lambda: loop(case, view, sample, answers))
    ours, fast = seconds(lambda: hs.ablate_heads(view, probe, metric, "zero", progress=False))
    found = np.stack([ours.per_example[head] for head in sample])
    return {
        "heads": len(heads),
        "engine": ours.provenance.attention,
        "loop_seconds_per_head": slow / len(sample),
        "headscope_seconds": fast,
        "times_faster": slow / len(sample) * len(heads) / fast,
        **({"at_most": at_most(view.shape.n_layers)} if case.at is None else {}),
        "largest_difference": float(np.abs(found - (theirs - clean)).max()),
    }


def main(rounds: int, every: int, layers: int) -> None:
    """Measure all models and print."""
    found = {}
    for name in CASES:
        found[name] = measured(name, rounds, every, layers)
        print(name, found[name], file=sys.stderr)
    asked = {"scan_over_pass": MOST, "times_faster": LEAST}
    report("encoders", {"layers": layers, "asked": asked, **found})


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*(given + [3, 12, 12][len(given) :]))
