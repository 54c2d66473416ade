"""Two minutes of ratios, each against its own baseline in the same run; fail where one got worse.

    python benchmarks/check.py            # compare with results/check.json, fail at 15% worse
    python benchmarks/check.py --write    # measure and keep as the new results/check.json

Small models of random weights, one thread, CPU seconds, the best of rounds in turns, so that a busy
machine changes little. A ratio that looks worse is measured twice more before it counts. Ratios
depend less on a machine than seconds do, but not on nothing: on another kind of processor, write
first and compare from there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support import cpu_seconds, machine, small_llama
from transformers import AutoModelForCausalLM, GPT2Config

import headscope as hs

RESULTS = Path(__file__).parent / "results" / "check.json"
WORSE = 1.15
LAYERS, HEADS, WIDTH, VOCAB = 4, 12, 768, 5000
SAMPLED = 4  # heads of a loop; its time is multiplied


@dataclass(frozen=True)
class Ratio:
    """Two ways to one result.

    Attributes:
        ours: runs headscope.
        baseline: runs what it is compared with.
        times: how often the baseline would have to run.
        faster: whether the ratio says how many times faster headscope is; else how many times the
            baseline it takes.
    """

    ours: Callable[[], object]
    baseline: Callable[[], object]
    times: float = 1.0
    faster: bool = False

    def measure(self) -> float:
        """The ratio, of the best of three rounds in turns."""
        ours, baseline = cpu_seconds(self.ours, self.baseline)
        one = ours / (baseline * self.times)
        return 1 / one if self.faster else one


def gpt2() -> Any:
    """Four blocks of the size of GPT-2 small, and few words."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_layer=LAYERS, initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).eval()


def ratios() -> dict[str, Ratio]:
    """All that is checked, by what the ratio says."""
    module, long = gpt2(), small_llama()
    model, wide = hs.load(module), hs.load(long)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB, (6, 96), generator=draw)
    text = torch.randint(3, 1024, (1, 2048), generator=draw)
    probe, far = hs.probes.from_tokens(tokens), hs.probes.from_tokens(text)
    names = ["previous_token", "induction", "entropy"]
    last = hs.Tap("resid_post", LAYERS - 1)
    end = torch.zeros_like(probe.real)
    end[:, -1] = True
    asked = hs.probes.from_tokens(
        tokens, marks={"end": end}, targets=torch.where(end, tokens.roll(1, 1), -1)
    )
    heads = LAYERS * HEADS

    @torch.no_grad()
    def plain(which: Any, ids: torch.Tensor) -> object:
        return which.base_model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def loop() -> None:
        """One pass with a hook for each of some heads."""
        for number in range(SAMPLED):
            layer = LAYERS * number // SAMPLED

            def silenced(_module: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
                z = given[0].clone()
                z[..., : WIDTH // HEADS] = 0
                return (z,)

            hook = module.transformer.h[layer].attn.c_proj.register_forward_pre_hook(silenced)
            module(input_ids=tokens, use_cache=False)
            hook.remove()

    def gradient() -> None:
        logits = module(input_ids=tokens, use_cache=False).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, tokens[:, 0]).backward()
        module.zero_grad()

    def ablate(positions: str | None) -> object:
        return hs.ablate_heads(
            model, asked, hs.metrics.loss, "zero", positions=positions, progress=False
        )

    def products() -> None:
        """Composition of every pair in two layers, matrices multiplied out."""
        outputs = [w.W_V @ w.W_O for w in map(model.weights, range(LAYERS))]
        for above in range(1, 2):
            read = outputs[above]
            for below in outputs[0][:2]:
                torch.linalg.matrix_norm(below @ read)

    return {
        "scan_times_a_plain_forward": Ratio(
            lambda: hs.score(model, probe, names, progress=False), lambda: plain(module, tokens)
        ),
        "scan_of_2048_tokens_times_a_plain_forward": Ratio(
            lambda: hs.score(wide, far, names, progress=False), lambda: plain(long, text)
        ),
        "ablation_times_faster_than_a_hook_loop": Ratio(
            lambda: ablate(None), loop, heads / SAMPLED, faster=True
        ),
        "ablation_of_one_position_times_faster_than_a_hook_loop": Ratio(
            lambda: ablate("end"), loop, heads / SAMPLED, faster=True
        ),
        "estimate_times_a_backward_pass": Ratio(
            lambda: hs.estimate_heads(model, asked, hs.metrics.loss, progress=False), gradient
        ),
        "geometry_of_layers_times_the_passes": Ratio(
            lambda: hs.geometry.layers(model, probe, progress=False),
            lambda: model.run(probe, until=last),
        ),
        "composition_times_faster_than_whole_matrices": Ratio(
            lambda: hs.circuits.composition(model, "V", fold_norm=False),
            products,
            LAYERS * (LAYERS - 1) / 2 * HEADS / 2,
            faster=True,
        ),
    }


def worse(found: float, committed: float, *, faster: bool) -> bool:
    """Whether a ratio is 15% worse than the committed one.

    Args:
        found: now.
        committed: before.
        faster: whether more is better.
    """
    return found * WORSE < committed if faster else found > committed * WORSE


def compare(
    checked: Mapping[str, Ratio], committed: Mapping[str, float], found: dict[str, float]
) -> list[str]:
    """Names of ratios that got worse; measured again, up to twice, where they seem to have.

    Args:
        checked: what is measured.
        committed: ratios by name; one that is new is not compared.
        found: takes the best ratio of each.
    """
    failed = []
    for name, ratio in checked.items():
        best = max if ratio.faster else min
        found[name] = ratio.measure()
        for _ in range(2):
            if name not in committed or not worse(
                found[name], committed[name], faster=ratio.faster
            ):
                break
            found[name] = best(found[name], ratio.measure())
        if name in committed and worse(found[name], committed[name], faster=ratio.faster):
            failed.append(name)
    return failed


def main() -> None:
    """Measure; compare or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the ratios as committed ones")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text("utf-8"))["ratios"] if RESULTS.exists() else {}
    committed = {} if given.write else known
    found: dict[str, float] = {}
    failed = compare(ratios(), committed, found)
    result = {"benchmark": "check", "ratios": found, "machine": machine()}
    text = json.dumps(result, indent=2)
    if given.write:
        RESULTS.write_text(text + "\n", "utf-8")
    print(text)
    for name in failed:
        print(f"{name}: {found[name]:.3g}, committed {committed[name]:.3g}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
