"""All kinds of heads against one plain forward pass of their probes, on GPT-2 small's shape.

Random weights behind a tokenizer that knows the words of the kinds' probes, so that all kinds are
asked. Ablation is left out of ``asked`` and counted in ``confirmed``: how much there is to ablate
depends on what is found.

Seconds are of the processor, so that other work on the machine does not count.

    python benchmarks/kinds.py           # prints JSON; minutes
    python benchmarks/kinds.py small     # two layers of it; a minute
    python benchmarks/kinds.py tiny      # two layers of two heads of 16; under a minute
"""

import re
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from support import report
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

import headscope as hs
from headscope.kinds import measures
from headscope.models.protocol import HeadModel


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the kinds' probes is one token."""
    modules = (measures, import_module("headscope.probes.pairs"))
    sources = [Path(str(module.__file__)).read_text("utf-8") for module in modules]
    found = [f" {word}" for word in re.findall(r"[A-Za-z]+|\d+", " ".join(sources))]
    made = ByteLevelBPETokenizer()
    texts = [*found * 4, *(f" {n}" for n in range(2000)), "Question: Answer: It's aren't I'm\n"]
    made.train_from_iterator(texts, vocab_size=20_000, min_frequency=1)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer)


SIZES: dict[str, dict[str, int]] = {
    "full": {"n_layer": 12},
    "small": {"n_layer": 2},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 512},
}


def model(size: str) -> HeadModel:
    """GPT-2 small's shape, or a smaller one, with random weights: peaky, so that heads differ."""
    torch.manual_seed(0)
    config = GPT2Config(**SIZES[size], initializer_range=0.1)
    return hs.load(AutoModelForCausalLM.from_config(config).eval(), tokenizer=tokenizer())


def plain(asked: HeadModel, probes: list[hs.Probe]) -> float:
    """Seconds of one forward pass over all probes, with the logits of one position."""
    started = time.process_time()
    with torch.no_grad():
        for probe in probes:
            for some in torch.arange(len(probe)).split(max(1, 8192 // probe.length)):
                batch = probe.examples(some)
                asked.module(
                    input_ids=batch.tokens, attention_mask=batch.real.long(), use_cache=False,
                    logits_to_keep=1,
                )  # fmt: skip
    return time.process_time() - started


def main(size: str) -> dict[str, Any]:
    """Ratios, and how many kinds were asked."""
    asked, seen = model(size), dict[tuple[Any, ...], hs.Probe]()
    run = type(asked).run

    def noting(self: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        # A batch of a probe, once however often it is run; controls are part of the price.
        if isinstance(batch, hs.Probe) and "control" not in batch.name:
            seen.setdefault((tuple(batch.tokens.shape), batch.tokens.numpy().tobytes()), batch)
        return run(self, batch, *rest, **options)

    type(asked).run = noting  # type: ignore[method-assign]
    started = time.process_time()
    found = hs.kinds.survey(asked, confirm=False)
    with_notes = time.process_time() - started
    type(asked).run = run  # type: ignore[method-assign]
    probes = list(seen.values())
    floor = min(plain(asked, probes) for _ in range(2))
    started = time.process_time()
    confirmed = hs.kinds.survey(asked)
    return {
        "size": size,
        "layers": asked.shape.n_layers,
        "kinds_asked": len(found.asked),
        "tokens_of_probes": sum(probe.tokens.numel() for probe in probes),
        "plain_seconds": round(floor, 3),
        "asked_over_plain": round(with_notes / floor, 2),
        "confirmed_over_plain": round((time.process_time() - started) / floor, 2),
        "heads_named": len(confirmed.findings),
    }


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "full"
    if chosen not in SIZES:
        sys.exit(f"unknown size {chosen!r}: {', '.join(SIZES)}")
    report("kinds", main(chosen))
