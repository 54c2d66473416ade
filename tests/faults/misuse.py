"""Calls with arguments that mean nothing; run as a script, it prints what each one raised.

In a process of its own: the tests check types at run time, which users do not.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import headscope as hs

LOSS = hs.metrics.loss
Call = Callable[[Any, Any], object]
CALLS: dict[str, tuple[Call, str]] = {
    "a name as the model": (
        lambda _, probe: hs.score("gpt2", probe, ["induction"]),
        "'gpt2' is not a loaded model",
    ),
    "None as the model": (
        lambda _, probe: hs.ablate_heads(None, probe, LOSS),
        "not a loaded model",
    ),
    "a module as the model": (
        lambda model, _: hs.circuits.ov(model.module.transformer.h[0]),
        "not a loaded model",
    ),
    "a text as the probe": (
        lambda model, _: hs.score(model, "hello", ["entropy"]),
        "a str is not a probe",
    ),
    "several probes": (
        lambda model, probe: hs.score(model, [probe, probe], ["entropy"]),
        "a list is not a probe",
    ),
    "a number as scorers": (
        lambda model, probe: hs.score(model, probe, 3),
        "scorers=3",
    ),
    "a negative head": (lambda *_: hs.HeadIndex(-1, 0), "layer=-1"),
    "a fraction as head": (lambda *_: hs.HeadIndex(0, 1.5), "head=1.5"),
    "no head": (lambda *_: hs.HeadIndex.parse(None), "None is not a head"),
    "three numbers as head": (
        lambda *_: hs.HeadIndex.parse((1, 2, 3)),
        "is not a head",
    ),
    "a number as heads": (
        lambda model, probe: hs.ablate_heads(model, probe, LOSS, heads=3),
        "heads=3",
    ),
    "a class as method": (
        lambda model, probe: hs.ablate_heads(model, probe, LOSS, hs.interventions.Zero),
        r"an intervention as Zero\(\)",
    ),
    "a word as seed": (
        lambda *_: hs.interventions.Resample(seed="x"),
        "seed='x'",
    ),
    "a text as planes": (
        lambda *_: hs.interventions.Denoise("x"),
        "planes='x' of Denoise",
    ),
    "a word as reference": (
        lambda *_: hs.interventions.Mean(reference="x"),
        "reference='x'",
    ),
    "fractions as tokens": (
        lambda *_: hs.probes.from_tokens(torch.rand(2, 3)),
        "rows of whole numbers",
    ),
    "numbers as texts": (
        lambda model, _: hs.probes.text(model, [3]),
        "3 is not a text",
    ),
    "a number as prompt": (
        lambda model, _: hs.lens.logit_lens(model, 3),
        "prompt=3",
    ),
    "a number as layers": (
        lambda model, probe: hs.capture.collect(model, probe, layers=1),
        r"layers=\[0, 1\]",
    ),
    "a word as offset": (
        lambda model, _: hs.circuits.qk(model, offset="x"),
        "offset='x'",
    ),
    "a key behind its query": (lambda model, _: hs.circuits.qk(model, offset=-1), "offset=-1"),
    "a word as k": (
        lambda model, probe: hs.score(model, probe, ["entropy"]).top("entropy", "x"),
        "k='x'",
    ),
    "an array as heatmap": (
        lambda *_: hs.plots.heatmap(np.zeros((2, 2))),
        "give a .*HeadScores",
    ),
    "a word as length": (
        lambda model, _: hs.probes.repeated_tokens(model, length="x"),
        "length='x'",
    ),
    "a word as batch": (lambda model, _: hs.probes.pairs(model, "ioi", batch="x"), "batch='x'"),
    "a word as lengths": (lambda model, _: hs.probes.needle(model, "x"), "lengths='x'"),
    "a number as the name of a score": (
        lambda model, probe: hs.score(model, probe, ["entropy"])[3],
        "unknown score",
    ),
    "a mark of other shape": (
        lambda *_: hs.probes.from_tokens([[1, 2, 3]], marks={"word": [[0, 1]]}),  # type: ignore[dict-item]
        "'word' has shape",
    ),
    "a text as the prompts of a flow": (
        lambda model, _: hs.flow.rollout(model, "x"),
        "a str is not a probe",
    ),
}


def main() -> None:
    """Print the kind and the sentence of every error, by name of the call."""
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=8, batch=2, seed=0)
    found = {}
    for name, (call, _) in CALLS.items():
        try:
            found[name] = ["nothing", repr(type(call(model, probe)))]
        except Exception as error:
            kind = "sentence" if isinstance(error, hs.HeadscopeError) else type(error).__name__
            found[name] = [kind, str(error)]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
