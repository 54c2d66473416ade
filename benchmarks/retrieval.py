"""Retrieval scores against plain generation, plain forwards and the way that is published.

(a) A random-weight llama, one prompt of 1k, 2k and 4k tokens: decoding with every head's most
attended key, against plain greedy generation on fused attention (``generate``), and against the
published way: the prompt on fused attention, then steps on eager attention with
``output_attentions=True``. The eager way without that split, patterns of the prompt included, is
what many notebooks do; where it does not fit, it "cannot run".
(b) The teacher-forced form against one fused forward of the same text.
(c) Peak memory of both forms at 1k to 32k tokens, each in a process of its own.
(d) Both forms once on a model with 32 heads, at 16k tokens: seconds and peak memory.

    python benchmarks/retrieval.py            # prints JSON
    python benchmarks/retrieval.py --small    # short texts, one round
    python benchmarks/retrieval.py wide       # part (d) alone
"""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from support import paired, peak_memory_mb, ratio, report, small_llama
from transformers import DynamicCache

import headscope as hs

SMALL = "--small" in sys.argv
LENGTHS = (512, 1024) if SMALL else (1024, 2048, 4096)
MEMORY_LENGTHS = (1024, 2048) if SMALL else (1024, 2048, 4096, 8192, 16384, 32768)
WIDE_LENGTH = 1024 if SMALL else 16384
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
ROUNDS = 1 if SMALL else 5
STEPS = 32
ANSWER = 16
# Whole eager patterns of a prompt: [layer head query key] in fp32, more than this is refused.
MOST_BYTES = 8 * 2**30


def probe_of(length: int, answer: int = ANSWER) -> hs.Probe:
    """Random tokens with a needle in the middle, whose answer is appended."""
    tokens = torch.randint(1, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    middle, end = length // 2, length - answer - 1
    tokens[0, end + 1 :] = tokens[0, middle : middle + answer]
    at = torch.arange(length)
    marks = {
        "needle": (at >= middle) & (at < middle + answer),
        "needle_answer": (at >= middle) & (at < middle + answer),
        "question": (at > end - 8) & (at <= end),
        "end": at == end,
        "answer": at > end,
        "answering": (at >= end) & (at < length - 1),
    }
    return hs.probes.from_tokens(tokens, marks={name: mark[None] for name, mark in marks.items()})


def decoding(length: int) -> dict[str, Any]:
    """Seconds and ratios of part (a)."""
    module = small_llama()
    model = hs.load(module)
    probe = probe_of(length)
    prompt = probe.tokens[:, : length - ANSWER]
    ours: dict[str, Any] = {}

    def headscope() -> None:
        ours["runs"] = hs.retrieval.follow(model, probe, new_tokens=STEPS, progress=False)

    def plain() -> torch.Tensor:
        module.set_attn_implementation("sdpa")
        with torch.no_grad():
            return module.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                do_sample=False,
                pad_token_id=0,
            )

    commands: dict[str, Callable[[], object]] = {
        "headscope": headscope,
        "plain": plain,
        "published": lambda: published(module, prompt),
    }
    size = 4 * model.shape.n_layers * model.shape.n_heads * prompt.shape[1] ** 2
    if size <= MOST_BYTES:
        commands["eager"] = lambda: eager(module, prompt)
    timings = paired(commands, rounds=ROUNDS)
    same = plain()[0, prompt.shape[1] :].tolist()
    return {
        "tokens": length,
        "seconds": timings,
        "times_plain_generation": ratio(timings, "headscope", "plain"),
        "times_faster_than_published": ratio(timings, "published", "headscope"),
        "times_faster_than_eager": ratio(timings, "eager", "headscope")
        if "eager" in timings
        else "cannot run",
        "same_tokens": list(ours["runs"].runs[0].tokens)
        == same[: len(ours["runs"].runs[0].tokens)],
    }


@torch.no_grad()
def published(module: Any, prompt: torch.Tensor) -> list[torch.Tensor]:
    """The prompt but its last token on fused attention, then eager steps with all rows."""
    cache = DynamicCache()
    module.set_attn_implementation("sdpa")
    module(prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    module.set_attn_implementation("eager")
    given, found = prompt[:, -1:], []
    for _ in range(STEPS):
        out = module(given, past_key_values=cache, use_cache=True, output_attentions=True)
        found.append(torch.stack([rows[0, :, -1].argmax(-1) for rows in out.attentions]))
        given = out.logits[:, -1:].argmax(-1)
    return found


@torch.no_grad()
def eager(module: Any, prompt: torch.Tensor) -> list[torch.Tensor]:
    """Everything on eager attention, the prompt's whole patterns included."""
    cache = DynamicCache()
    module.set_attn_implementation("eager")
    given, found = prompt, []
    for _ in range(STEPS):
        out = module(given, past_key_values=cache, use_cache=True, output_attentions=True)
        found.append(torch.stack([rows[0, :, -1].argmax(-1) for rows in out.attentions]))
        given = out.logits[:, -1:].argmax(-1)
    return found


def forced(length: int) -> dict[str, Any]:
    """Seconds and ratios of part (b)."""
    module = small_llama()
    model = hs.load(module)
    probe = probe_of(length)

    def headscope() -> object:
        return hs.score(model, probe, "retrieval", progress=False)

    def plain() -> object:
        with torch.no_grad():
            return module.base_model(input_ids=probe.tokens, use_cache=False)

    module.set_attn_implementation("sdpa")
    timings = paired({"headscope": headscope, "plain": plain}, rounds=ROUNDS)
    return {
        "tokens": length,
        "seconds": timings,
        "times_a_plain_forward": ratio(timings, "headscope", "plain"),
    }


def memory_of(what: str, length: int, **sizes: int) -> None:
    """Print the seconds of one run, and this process's peak memory in MB before and after it."""
    module = small_llama(**sizes)
    model = hs.load(module)
    probe, short = probe_of(length), probe_of(64)
    hs.score(model, short, "retrieval", progress=False)
    hs.retrieval.follow(model, short, new_tokens=2, progress=False)
    prompt = probe.tokens[:, : length - ANSWER]
    before, started = peak_memory_mb(), time.perf_counter()
    if what == "decoded":
        hs.retrieval.follow(model, probe, new_tokens=STEPS, progress=False)
    elif what == "forced":
        hs.score(model, probe, "retrieval", progress=False)
    elif what == "published":
        published(module, prompt)
    elif what == "eager":
        eager(module, prompt)
    else:
        module.set_attn_implementation("sdpa")
        with torch.no_grad():
            module.base_model(input_ids=probe.tokens, use_cache=False)
    print(time.perf_counter() - started, before, peak_memory_mb())


def alone(*arguments: str) -> tuple[float, float, float] | None:
    """What a process of its own printed: seconds, MB before, MB after; None where it died."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None
    seconds, before, after = map(float, done.stdout.split()[-3:])
    return seconds, before, after


def wide() -> dict[str, Any]:
    """Seconds and peak memory of part (d)."""
    found: dict[str, Any] = {"tokens": WIDE_LENGTH, **WIDE}
    patterns = 4 * 4 * WIDE["num_attention_heads"] * WIDE_LENGTH**2
    found["patterns_would_take_mb"] = round(patterns / 2**20, 1)
    for what in ("plain", "forced", "decoded"):
        made = alone(what, str(WIDE_LENGTH), "wide")
        if made is None:
            found[what] = "cannot run"
            continue
        seconds, before, after = made
        found[what] = {
            "seconds": round(seconds, 2),
            "peak_mb": round(after, 1),
            "growth_mb": round(after - before, 1),
        }
    return found


def memory() -> list[dict[str, Any]]:
    """Peak memory of every way at every length."""
    rows = []
    for length in MEMORY_LENGTHS:
        row: dict[str, Any] = {"tokens": length}
        for what in ("decoded", "forced", "plain", "published", "eager"):
            if what in ("published", "eager") and length > LENGTHS[-1]:
                continue
            if what == "eager" and 4 * 4 * 8 * length**2 > MOST_BYTES:
                row["eager_peak_mb"] = "cannot run"
                continue
            made = alone(what, str(length))
            if made is None:
                row[f"{what}_peak_mb"] = "cannot run"
                continue
            _, before, after = made
            row[f"{what}_peak_mb"] = round(after, 1)
            row[f"{what}_growth_mb"] = round(after - before, 1)
        rows.append(row)
    return rows


if __name__ == "__main__":
    if len(sys.argv) >= 3 and sys.argv[2].isdigit():
        memory_of(sys.argv[1], int(sys.argv[2]), **(WIDE if "wide" in sys.argv else {}))
    elif "wide" in sys.argv:
        report("retrieval", {"wide": wide()})
    else:
        report(
            "retrieval",
            {
                "decoding": [decoding(length) for length in LENGTHS],
                "teacher_forced": [forced(length) for length in LENGTHS],
                "memory": memory(),
                "wide": wide(),
            },
        )
