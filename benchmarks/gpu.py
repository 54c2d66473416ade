"""Everything that is meant to be fast on a GPU, in one run of under eight minutes; prints JSON.

GPT-2 small (fp32) and the shape of Llama 3 8B (bf16, grouped heads), both with random weights, at
growing lengths, as far as memory and the time budget allow. Each item runs beside what it is
compared with, in turn and on the same device, and says whether both give the same numbers:

* scan: rows of the last 64 queries and, where short enough, of all queries, against the plain
  fused forward pass without logits;
* ablation: all positions, and the last one, against a loop with one hooked pass per head;
* path patching: direct effects on the logits against three hooked passes per sender;
* decoding with rows kept, against plain greedy generation;
* logit lens against the model's own norm and unembedding on its hidden states.

Only torch and transformers are needed beside headscope.

    python benchmarks/gpu.py > benchmarks/results/gpu.json      # on the GPU, if there is one
    python benchmarks/gpu.py --small --device cpu               # the script's own logic, in seconds
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import headscope as hs
from headscope.base.options import is_out_of_memory
from headscope.scorer import queries_at

TAIL = 64  # queries that the long scan looks at
ROUNDS = 3
STEPS = 32  # of decoding
ANSWER = 16
SAMPLED = 8  # heads of a hook loop; its time is multiplied
PLAIN, OURS = "plain", "headscope"


@dataclass(frozen=True)
class Shape:
    """A model of random weights, and what is asked of it.

    Attributes:
        config: of transformers.
        dtype: of its weights.
        scans: lengths of scans, decoding and lenses.
        ablated: length of ablations.
        every: of all heads, each n-th is ablated.
        whole: longest scan of all queries.
    """

    name: str
    config: Any
    dtype: torch.dtype
    scans: tuple[int, ...]
    ablated: int
    every: int
    whole: int


def shapes(*, small: bool) -> list[Shape]:
    """The models that are measured; small: of the same kinds, in seconds on a processor."""
    if small:
        llama = LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            initializer_range=0.3, bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        gpt2 = GPT2Config(
            vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
            bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        return [
            Shape("gpt2", gpt2, torch.float32, (72,), 32, 2, 96),
            Shape("llama", llama, torch.float32, (72, 100), 32, 2, 96),
        ]
    llama = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072 + 256,
        rope_theta=500000.0, eos_token_id=None,
    )  # fmt: skip
    gpt2 = GPT2Config(n_positions=2048, initializer_range=0.1, eos_token_id=None)
    return [
        Shape("gpt2_small", gpt2, torch.float32, (2048 - STEPS,), 128, 1, 2048),
        Shape("llama_3_8b", llama, torch.bfloat16, (2048, 8192, 32768, 131072), 512, 16, 8192),
    ]


@dataclass
class Clock:
    """Times items on a device, within a budget.

    Attributes:
        device: that is waited for.
        seconds: the budget of the whole run.
        items: what was measured, by name.
    """

    device: torch.device
    seconds: float
    rounds: int
    items: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.perf_counter() - self.started)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, work: Callable[[], Any]) -> tuple[Any, float, float | None]:
        """A result, its seconds and the peak of memory in MB while it was computed."""
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.wait()
        start = time.perf_counter()
        result = work()
        self.wait()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self.device) / 1e6 if gpu else None
        return result, seconds, peak

    def item(
        self,
        name: str,
        ours: Callable[[], Any],
        plain: Callable[[], Any],
        equal: Callable[[Any, Any], Mapping[str, Any]],
        *,
        share: float = 1.0,
    ) -> None:
        """Run both in turn; medians, ratio and what ``equal`` says of the results.

        Args:
            name: of the item.
            ours: what headscope does.
            plain: what it is compared with.
            equal: facts about both results.
            share: part of the work that ``plain`` does; its seconds are divided by it.
        """
        if self.left < 5:
            self.items[name] = {"skipped": "the time budget is spent"}
            return
        try:
            self.items[name] = self._measured({OURS: ours, PLAIN: plain}, equal, share)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.items[name] = {"skipped": "out of memory"}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measured(
        self,
        works: Mapping[str, Callable[[], Any]],
        equal: Callable[[Any, Any], Mapping[str, Any]],
        share: float,
    ) -> dict[str, Any]:
        results, seconds, peaks = {}, {name: list[float]() for name in works}, {}
        warm = 0.0
        for name, work in works.items():  # a first time, which is not counted
            results[name], spent, peaks[name] = self.once(work)
            warm += spent
        facts = dict(equal(results[OURS], results[PLAIN]))
        results.clear()
        for _ in range(min(self.rounds, max(1, int(self.left / 4 / max(warm, 1e-9))))):
            for name, work in works.items():
                seconds[name].append(self.once(work)[1])
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        medians[PLAIN] /= share
        return {
            "seconds": {name: round(value, 5) for name, value in medians.items()},
            "ours_over_plain": round(medians[OURS] / medians[PLAIN], 3),
            "rounds": len(seconds[OURS]),
            "peak_mb": {name: peak and round(peak, 1) for name, peak in peaks.items()},
            **facts,
        }


def close(found: Any, expected: Any, allowed: float) -> dict[str, Any]:
    """The largest difference as a share of the largest number, and whether that is allowed."""
    a, b = (torch.from_numpy(np.array(one, dtype=np.float64)) for one in (found, expected))
    known = ~(a.isnan() | b.isnan())
    size = float(b[known].abs().max().clamp_min(1e-12))
    difference = float((a[known] - b[known]).abs().max()) / size
    return {"largest_difference": difference, "equal": difference <= allowed}


def build(shape: Shape, device: torch.device) -> nn.Module:
    """The model on its device, in its own type from the start where the device can do that."""
    torch.manual_seed(0)
    with made_on(device, shape.dtype):
        module: nn.Module = AutoModelForCausalLM.from_config(
            shape.config, attn_implementation="sdpa"
        )
    return module.to(device=device, dtype=shape.dtype).eval()


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Scope in which tensors are made on a GPU, in a type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device if device.type == "cuda" else "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def probe_of(length: int, words: int) -> hs.Probe:
    """Random tokens, the last few of which repeat some from the middle; answer and corrupt pair."""
    generator = torch.Generator().manual_seed(0)
    tokens, other = torch.randint(1, words, (2, 1, length), generator=generator)
    middle, end = length // 2, length - ANSWER - 1
    tokens[0, end + 1 :] = tokens[0, middle : middle + ANSWER]
    at = torch.arange(length)
    marks = {
        "needle": (at >= middle) & (at < middle + ANSWER),
        "needle_answer": (at >= middle) & (at < middle + ANSWER),
        "question": (at > end - 8) & (at <= end),
        "end": at == end,
        "answer": at > end,
        "answering": (at >= end) & (at < length - 1),
        "tail": at >= length - TAIL,
        "last": at == length - 1,
    }
    asked = (at == length - 1)[None]
    probe = hs.probes.from_tokens(tokens, marks={name: mark[None] for name, mark in marks.items()})
    probe = replace(
        probe,
        targets=torch.where(asked, int(tokens[0, 3]), -1),
        foils=torch.where(asked, int(tokens[0, 5]), -1),
    )
    return replace(probe, corrupt=replace(probe, tokens=other))


@hs.row_scorer(
    name="tail_first_token", unit="attention", bounds=(0.0, 1.0), queries=queries_at("tail")
)
def tail_first_token(rows: Any, probe: Any) -> Any:
    """Attention of the last queries to the first token."""
    return rows.pattern[..., 0]


def body(module: Any, tokens: Tensor) -> Tensor:
    """Last hidden state of a plain fused pass."""
    with torch.no_grad():
        hidden: Tensor = module.base_model(input_ids=tokens, use_cache=False)[0]
    return hidden


def scan(clock: Clock, shape: Shape, model: Any, length: int) -> None:
    """Rows of the last queries; of all, up to the shape's longest."""
    module, probe = model.module, probe_of(length, shape.config.vocab_size)
    tokens = probe.tokens.to(clock.device)
    scans: dict[str, list[Any]] = {f"last {TAIL} queries": [tail_first_token]}
    if length <= shape.whole:
        scans["all queries"] = ["previous_token", "current_token", "entropy"]
    for what, scorers in scans.items():
        clock.item(
            f"{shape.name}: scan, {what}, {length} tokens",
            lambda scorers=scorers: hs.score(model, probe, scorers, progress=False),
            lambda: body(module, tokens),
            lambda table, _: {
                "equal": all(bool(np.isfinite(one.mean).all()) for one in table.values())
            },
        )


def rows_of_eager(shape: Shape, model: Any) -> dict[str, Any]:
    """The scan's numbers at the shortest length against whole patterns of eager attention."""
    module, probe = model.module, probe_of(shape.ablated, shape.config.vocab_size)
    table = hs.score(model, probe, [tail_first_token], progress=False)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        out = module(probe.tokens.to(module.device), output_attentions=True, logits_to_keep=1)
    module.set_attn_implementation("sdpa")
    tail = probe.mark("tail")[0] & (torch.arange(probe.length) > 0)
    eager = [rows[0].float()[:, tail.to(rows.device), 0].mean(1).cpu() for rows in out.attentions]
    least = 1e-4 if shape.dtype == torch.float32 else 5e-2
    return close(table["tail_first_token"].mean, torch.stack(eager).numpy(), least)


def projections(model: Any) -> dict[int, nn.Module]:
    """Output projection of each layer's attention: what the loops hook."""
    return {layer: model.parts.projection(layer) for layer in model.shape.attention_layers}


@contextmanager
def giving(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Scope in which a module's input is changed."""
    handle = module.register_forward_pre_hook(lambda _, given: (change(given[0]), *given[1:]))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def metric_of(module: Any, tokens: Tensor, probe: hs.Probe) -> float:
    """Logit difference at the last token of a plain pass."""
    logits = module(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return float(logits[probe.targets[0, -1]] - logits[probe.foils[0, -1]])


def ablation(clock: Clock, shape: Shape, model: Any) -> None:
    """Zero heads everywhere, and at the last position, against one hooked pass per head."""
    module, probe = model.module, probe_of(shape.ablated, shape.config.vocab_size)
    tokens, width = probe.tokens.to(clock.device), model.shape.d_head
    heads = list(model.shape.heads)[:: shape.every]
    sample = heads[:: max(1, len(heads) // SAMPLED)]
    hooked = projections(model)
    for where, positions in (("all positions", None), ("last position", "last")):
        first = 0 if positions is None else shape.ablated - 1

        def loop(first: int = first) -> list[float]:
            values = [metric_of(module, tokens, probe)]
            for layer, head in sample:

                def off(z: Tensor, at: int = head * width) -> Tensor:
                    z = z.clone()
                    z[:, first:, at : at + width] = 0
                    return z

                with giving(hooked[layer], off):
                    values.append(metric_of(module, tokens, probe))
            return [value - values[0] for value in values[1:]]

        clock.item(
            f"{shape.name}: ablation, {where}, {len(heads)} heads, {shape.ablated} tokens",
            lambda positions=positions: hs.ablate_heads(
                model, probe, hs.metrics.logit_difference, "zero", heads,
                positions=positions, progress=False,
            ),
            loop,
            lambda ours, theirs: close([ours.mean[one] for one in sample], theirs, allowed(shape)),
            share=len(sample) / len(heads),
        )  # fmt: skip


def allowed(shape: Shape) -> float:
    """Rounding as a share of the largest effect; half precision keeps about two digits of one."""
    return 1e-3 if shape.dtype == torch.float32 else 0.5


def path_patching(clock: Clock, shape: Shape, model: Any) -> None:
    """Direct effects of senders on the logits: all other heads frozen, MLPs computed anew."""
    module, probe = model.module, probe_of(shape.ablated, shape.config.vocab_size)
    tokens, other = (one.tokens.to(clock.device) for one in (probe, probe.corrupt))
    width, hooked = model.shape.d_head, projections(model)
    senders = list(model.shape.heads)[:: shape.every]
    sample = senders[:: max(1, len(senders) // SAMPLED)]

    def kept(ids: Tensor) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        handles = [
            one.register_forward_pre_hook(
                lambda _, given, layer=layer: found.__setitem__(layer, given[0].clone())
            )
            for layer, one in hooked.items()
        ]
        body(module, ids)
        for handle in handles:
            handle.remove()
        return found

    def loop() -> list[float]:
        clean, corrupt = kept(tokens), kept(other)
        values = [metric_of(module, tokens, probe)]
        for layer, head in sample:
            sent = {number: z for number, z in clean.items() if number >= layer}
            sent[layer] = sent[layer].clone()
            part = slice(head * width, (head + 1) * width)
            sent[layer][..., part] = corrupt[layer][..., part]
            handles = [
                hooked[number].register_forward_pre_hook(lambda _, given, z=z: (z, *given[1:]))
                for number, z in sent.items()
            ]
            values.append(metric_of(module, tokens, probe))
            for handle in handles:
                handle.remove()
        return [value - values[0] for value in values[1:]]

    clock.item(
        f"{shape.name}: path patching to the logits, {len(senders)} senders, "
        f"{shape.ablated} tokens",
        lambda: hs.path_patch(
            model, probe, hs.metrics.logit_difference, senders=senders, progress=False
        ),
        loop,
        lambda ours, theirs: close([ours.mean[one] for one in sample], theirs, allowed(shape)),
        share=len(sample) / len(senders),
    )


def decoding(clock: Clock, shape: Shape, model: Any, length: int) -> None:
    """Greedy decoding with every step's rows looked at, against plain generation."""
    module, probe = model.module, probe_of(length, shape.config.vocab_size)
    prompt = probe.tokens[:, : length - ANSWER].to(clock.device)
    steps = min(STEPS, ANSWER)

    def plain() -> list[int]:
        with torch.no_grad():
            said = module.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        ids: list[int] = said[0, prompt.shape[1] :].tolist()
        return ids

    def same(runs: Any, ids: list[int]) -> dict[str, Any]:
        own = list(runs.runs[0].tokens)
        shared = next((i for i, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), None)
        exact = shared is None
        # Half precision may break ties between nearly equal logits of random weights either way.
        return {"equal": exact or shape.dtype != torch.float32, "first_difference": shared}

    clock.item(
        f"{shape.name}: decoding, {length} tokens, {steps} steps",
        lambda: hs.retrieval.follow(model, probe, new_tokens=steps, progress=False),
        plain,
        same,
    )


def logit_lens(clock: Clock, shape: Shape, model: Any, length: int) -> None:
    """Every layer's most likely token at the last positions."""
    module, probe = model.module, probe_of(length, shape.config.vocab_size)
    tokens = probe.tokens.to(clock.device)
    final, head = model.layout.final_norm, model.layout.unembedding
    ids, last = probe.tokens[0].tolist(), list(range(length - TAIL, length))

    @torch.no_grad()
    def plain() -> np.ndarray:
        states = module.base_model(
            input_ids=tokens, use_cache=False, output_hidden_states=True
        ).hidden_states
        below = [head(final(one[:, -TAIL:])).argmax(-1)[0] for one in states[:-1]]
        best: np.ndarray = (
            torch.stack([*below, head(states[-1][:, -TAIL:]).argmax(-1)[0]]).cpu().numpy()
        )
        return best

    def same(grid: Any, best: np.ndarray) -> dict[str, Any]:
        share = float((grid.ids[..., 0] == best).mean())
        return {
            "same_tokens": round(share, 4),
            "equal": share >= (0.999 if shape.dtype == torch.float32 else 0.9),
        }

    clock.item(
        f"{shape.name}: logit lens, last {TAIL} positions, {length} tokens",
        lambda: hs.lens.logit_lens(model, ids, positions=last, k=1),
        plain,
        same,
    )


def memory_growth(items: Mapping[str, Any], lengths: tuple[int, ...]) -> dict[str, float]:
    """Peak memory a token of the long scans, MB per 1000 tokens between lengths: flat if linear."""
    peaks = {
        length: one["peak_mb"][OURS]
        for length in lengths
        for name, one in items.items()
        if f"scan, last {TAIL} queries, {length} " in name and one.get("peak_mb", {}).get(OURS)
    }
    pairs = list(zip(peaks, list(peaks)[1:], strict=False))
    return {f"{a}-{b}": round((peaks[b] - peaks[a]) / (b - a) * 1000, 2) for a, b in pairs}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny models: the script's own logic")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=440.0, help="time budget of everything")
    parser.add_argument("--only", default="", help="only models whose name has this part")
    given = parser.parse_args(arguments)
    clock = Clock(torch.device(given.device), given.seconds, 1 if given.small else ROUNDS)
    loading: dict[str, float] = {}
    growth: dict[str, dict[str, float]] = {}
    for shape in shapes(small=given.small):
        if given.only not in shape.name:
            continue
        module = build(shape, clock.device)
        model, loading[shape.name], _ = clock.once(lambda module=module: hs.load(module))
        clock.items[f"{shape.name}: rows against eager attention"] = rows_of_eager(shape, model)
        ablation(clock, shape, model)
        path_patching(clock, shape, model)
        for length in shape.scans:
            scan(clock, shape, model, length)
            decoding(clock, shape, model, length)
            logit_lens(clock, shape, model, length)
        growth[shape.name] = memory_growth(clock.items, shape.scans)
        del module, model
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
    results = {
        "benchmark": "gpu",
        "items": clock.items,
        "opening_a_model_seconds": {name: round(value, 2) for name, value in loading.items()},
        "peak_mb_per_1000_tokens": growth,
        "seconds": round(time.perf_counter() - clock.started, 1),
        "machine": {
            "device": torch.cuda.get_device_name() if clock.device.type == "cuda" else given.device,
            "processor": platform.processor() or platform.machine(),
            "versions": {name: version(name) for name in ("headscope", "torch", "transformers")},
        },
    }
    print(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
