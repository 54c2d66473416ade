"""What every benchmark shares: models of random weights, paired timings, JSON."""

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

PACKAGES = ("headscope", "torch", "transformers", "transformer-lens")


def gpt2_small(seed: int = 0) -> Any:
    """GPT-2 small (124M) with random weights, peaky enough that scores differ."""
    torch.manual_seed(seed)
    config = GPT2Config(initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).eval()


def small_llama(seed: int = 0, **sizes: Any) -> Any:
    """A llama with grouped heads and random weights."""
    torch.manual_seed(seed)
    wanted = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 65536,
        "initializer_range": 0.1,
    } | sizes
    return AutoModelForCausalLM.from_config(LlamaConfig(**wanted)).eval()


def paired(
    commands: dict[str, Callable[[], object]], *, rounds: int = 5, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds of each command, run in turn A B C A B C, so that drift hits all alike."""
    for _ in range(warm_up):
        for command in commands.values():
            command()
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            command()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "median": statistics.median(times),
            "min": min(times),
            "max": max(times),
        }
        for name, times in seconds.items()
    }


def cpu_seconds(*works: Callable[[], object], rounds: int = 3) -> list[float]:
    """CPU seconds of the best of some calls of each, taken in turns."""
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for number, work in enumerate(works):
            start = time.process_time()
            work()
            best[number] = min(best[number], time.process_time() - start)
    return best


def ratio(timings: dict[str, dict[str, float]], slow: str, fast: str) -> float:
    """How many times faster, medians."""
    return round(timings[slow]["median"] / timings[fast]["median"], 2)


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, MB.

    On Linux from /proc: what ``getrusage`` tells is handed down from the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 1024**2)


def machine() -> dict[str, Any]:
    """What is measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {p: version(p) for p in PACKAGES},
    }


def report(name: str, results: dict[str, Any]) -> None:
    """Print one JSON object: results, and what they were measured on."""
    print(json.dumps({"benchmark": name, **results, "machine": machine()}, indent=2))
