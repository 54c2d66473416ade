"""Scan against its peers: detect_head, run_with_cache, and the floor of one plain fused forward.

(a) Three pattern scorers over 10 random sequences of 100 tokens, GPT-2 small with random
weights: headscope, three transformer-lens ``detect_head`` calls per prompt, one ``run_with_cache``
limited to patterns with the same reductions, and one plain fused forward without logits.
(b) Peak memory at growing lengths on a small llama: scan against a plain fused forward, each in a
process of its own.

    python benchmarks/scan.py            # prints JSON
"""

import subprocess
import sys
from typing import Any

import torch
from support import gpt2_small, paired, peak_memory_mb, ratio, report, small_llama

import headscope as hs

DETECTED = ("previous_token", "duplicate_token", "induction")
LENGTHS = (1024, 4096, 16384, 32768)


def speed() -> dict[str, Any]:
    """Seconds and ratios of part (a), with the largest difference between the scores."""
    from transformer_lens.head_detector import detect_head

    module = gpt2_small()
    model = hs.load(module)
    bridge = model.bridge
    bridge.to_tokens = lambda ids, **_: ids  # detect_head takes text; these are ids already
    tokens = torch.randint(0, 50257, (10, 100), generator=torch.Generator().manual_seed(0))
    probe = hs.probes.from_tokens(tokens)
    names = [f"detect_head_{name}" for name in DETECTED]

    def headscope() -> dict[str, torch.Tensor]:
        table = hs.score(model, probe, names, progress=False)
        means = {name: table[f"detect_head_{name}"].mean for name in DETECTED}
        return {name: torch.from_numpy(mean.copy()) for name, mean in means.items()}

    def detect() -> dict[str, torch.Tensor]:
        return {
            name: torch.stack(
                [detect_head(bridge, row[None], f"{name}_head") for row in tokens]
            ).mean(0)
            for name in DETECTED
        }

    def cached() -> dict[str, torch.Tensor]:
        return _from_cache(bridge, tokens)

    def plain() -> object:
        with torch.no_grad():
            return module.base_model(input_ids=tokens, use_cache=False)

    with torch.no_grad():
        ours, theirs, cache = headscope(), detect(), cached()
        timings = paired(
            {
                "headscope": headscope,
                "detect_head": detect,
                "run_with_cache": cached,
                "plain": plain,
            }
        )
    return {
        "seconds": timings,
        "times_faster_than_detect_head": ratio(timings, "detect_head", "headscope"),
        "times_faster_than_run_with_cache": ratio(timings, "run_with_cache", "headscope"),
        "times_a_plain_forward": ratio(timings, "headscope", "plain"),
        "largest_difference": {
            "detect_head": max(float((ours[n] - theirs[n]).abs().max()) for n in DETECTED),
            "run_with_cache": max(float((ours[n] - cache[n]).abs().max()) for n in DETECTED),
        },
    }


def _from_cache(bridge: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same three numbers from whole cached patterns."""
    _, cache = bridge.run_with_cache(tokens, names_filter=lambda n: n.endswith("hook_pattern"))
    equal = (tokens[:, :, None] == tokens[:, None, :]).float().tril(-1)
    follower = torch.nn.functional.pad(equal[:, :, :-1], (1, 0)).tril()
    previous = torch.diag(torch.ones(tokens.shape[1] - 1), -1).expand_as(equal)
    masks = {"previous_token": previous, "duplicate_token": equal, "induction": follower}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in masks}
    for layer in range(bridge.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        for name, mask in masks.items():
            hit = torch.einsum("bhqk,bqk->bh", pattern, mask)
            found[name].append((hit / pattern.sum((-1, -2))).mean(0))
    return {name: torch.stack(layers) for name, layers in found.items()}


def memory_of(what: str, length: int) -> None:
    """Print this process's peak memory in MB, before and after one pass."""
    model = small_llama()
    tokens = torch.randint(1, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    wrapped = hs.load(model)
    probe = hs.probes.from_tokens(tokens)
    hs.score(wrapped, hs.probes.from_tokens(tokens[:, :64]), ["induction"], progress=False)
    before = peak_memory_mb()
    if what == "scan":
        hs.score(wrapped, probe, ["previous_token", "induction", "entropy"], progress=False)
    else:
        with torch.no_grad():
            model.base_model(input_ids=tokens, use_cache=False)
    print(before, peak_memory_mb())


def memory() -> list[dict[str, float]]:
    """Peak memory of scan and of a plain forward at every length."""
    rows = []
    for length in LENGTHS:
        peaks = {}
        for what in ("scan", "plain"):
            done = subprocess.run(
                [sys.executable, __file__, what, str(length)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            before, after = map(float, done.stdout.split()[-2:])
            peaks[f"{what}_peak_mb"] = round(after, 1)
            peaks[f"{what}_growth_mb"] = round(after - before, 1)
        peaks["ratio"] = round(peaks["scan_peak_mb"] / peaks["plain_peak_mb"], 2)
        rows.append({"tokens": length, **peaks})
    return rows


if __name__ == "__main__":
    if len(sys.argv) == 3:
        memory_of(sys.argv[1], int(sys.argv[2]))
    else:
        report("scan", {"speed": speed(), "memory": memory()})
