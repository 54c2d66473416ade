"""Time and memory of attention rows in texts of up to 128k tokens on a processor; prints JSON.

    python benchmarks/long_context.py > benchmarks/results/long_context.json    # three minutes
    python benchmarks/long_context.py --tokens 512 1024                         # its logic

Small models with random weights, since the plain pass itself is quadratic in the length: one layer
of a llama (two heads of 32) whose last queries are read, and two layers of a mistral with a window
of 1,024 keys, all of whose queries are scored. ``ns_per_row_and_key`` is processor time per query,
key and head: constant where time is linear in rows times length. Every length runs in a process of
its own, so that peaks of memory are its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from support import peak_memory_mb, report, small_llama
from transformers import AutoModelForCausalLM, MistralConfig

import headscope as hs
from headscope.models.taps import Reads, TapView, at_layers

TOKENS = (8192, 16384, 32768, 131072)
ROWS = (64, 256, 1024)
CHUNK = 32 << 20  # bytes of rows that are held at once, as in a scan on a processor
WINDOW = 1024
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1 << 20,
    "initializer_range": 0.3,
}


class Rows:
    """Reader that times exact rows of the last queries of each layer."""

    def __init__(self) -> None:
        """Start without times."""
        self.seconds: dict[int, float] = {}

    def reads(self, shape: Any) -> Reads:
        """All attention layers."""
        return at_layers(shape, self._on_layer)

    def _on_layer(self, view: TapView) -> None:
        last = view.n_queries
        view.rows(torch.arange(last - 1, last))  # keys become fp32 once a layer
        for count in ROWS:
            started = time.process_time()
            wanted = torch.arange(last - min(count, last), last)
            for positions in hs.capture.chunks(wanted, 3 * 4 * view.z.shape[2] * last, CHUNK):
                view.rows(positions)
            self.seconds[count] = time.process_time() - started


def llama(tokens: int) -> dict[str, Any]:
    """Rows of the last queries of a text, and the pass that they are read in."""
    model = hs.load(small_llama(**SIZES, num_hidden_layers=1))
    ready = peak_memory_mb()
    started = time.process_time()
    ((_, found),) = hs.capture.stream(model, text(tokens), lambda *_: Rows())
    whole = time.process_time() - started
    rows = {f"seconds_of_{count}_rows": round(s, 4) for count, s in found.seconds.items()}
    each = found.seconds[ROWS[-1]] / (min(ROWS[-1], tokens) * tokens * model.shape.n_heads)
    return {
        "tokens": tokens,
        **rows,
        "ns_per_row_and_key": round(1e9 * each, 3),
        "seconds_of_the_pass": round(whole - sum(found.seconds.values()), 2),
        "peak_mb": round(peak_memory_mb()),
        "mb_before": round(ready),
    }


def windowed(tokens: int) -> dict[str, Any]:
    """A scan of all queries under a window."""
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=WINDOW)
    model = hs.load(AutoModelForCausalLM.from_config(config).eval())
    ready = peak_memory_mb()
    started = time.process_time()
    hs.score(model, text(tokens), ["previous_token", "entropy"], progress=False)
    seconds = time.process_time() - started
    return {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "us_per_token": round(1e6 * seconds / tokens, 1),
        "peak_mb": round(peak_memory_mb()),
        "mb_before": round(ready),
    }


def text(tokens: int) -> hs.Probe:
    """One example of random tokens."""
    draw = torch.Generator().manual_seed(0)
    return hs.probes.from_tokens(torch.randint(3, 1000, (1, tokens), generator=draw))


KINDS = {"llama": llama, "windowed": windowed}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--alone", choices=KINDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.alone is not None:
        print(json.dumps(KINDS[given.alone](given.tokens[0])))
        return
    found = {kind: [in_own_process(kind, one) for one in given.tokens] for kind in KINDS}
    for row in (*found["llama"], *found["windowed"]):
        row.setdefault("limit_mb", 24000)
    report("long_context", {"window": WINDOW, **found})


def in_own_process(kind: str, tokens: int) -> dict[str, Any]:
    """One measurement in a fresh interpreter."""
    command = [sys.executable, __file__, "--alone", kind, "--tokens", str(tokens)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(kind, row, file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    main()
