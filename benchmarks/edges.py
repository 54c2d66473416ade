"""Edges against their usual ways; prints JSON ratios of one run.

GPT-2 small's shape with random weights, pairs of random texts that differ in a few tokens. Edge
attribution patching is measured against three ways and against a floor:

- ``transformer-lens``: what the EAP-IG repository does, on a ``TransformerBridge`` with split
  queries, keys and values and results of heads: the corrupt run, a clean run for its logits, a
  clean run with gradients, logits at every position, hooks that keep changes and multiply them with
  gradients, a backward pass that reaches the weights too;
- ``written plainly``: the same without the package;
- ``tightest plain way``: without the second clean run, with logits at the end alone, and without
  gradients of weights;
- ``floor``: the model's own code, two runs and one backward pass, with no edge scored.

Exact patching of the edges from heads into the output is measured against a loop of hooks. Scores
are compared while they are timed; works take turns. ``--examples`` and ``--layers`` make it
smaller.
"""

import argparse
from dataclasses import replace
from typing import Any

import torch
from support import paired, peak_memory_mb, ratio, report
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import headscope as hs
from headscope.edges.attribute import output_edges
from headscope.edges.written import EdgeMeasurement
from headscope.models.bridge.model import bridge_over
from headscope.probes import Probe, from_tokens

LENGTH = 20


def texts(examples: int) -> Probe:
    """Pairs whose middle tokens differ, with an answer and a foil at the end."""
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, 50000, (examples, LENGTH), generator=drawn)
    other = tokens.clone()
    other[:, 5:9] = torch.randint(100, 50000, (examples, 4), generator=drawn)
    targets, foils = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
    targets[:, -1], foils[:, -1] = 1000, 2000
    return replace(from_tokens(tokens), corrupt=from_tokens(other), targets=targets, foils=foils)


def difference(logits: Tensor) -> Tensor:
    """The metric of every example."""
    return logits[:, -1, 1000] - logits[:, -1, 2000]


class UsualWay:
    """GPT-2 with a copy of the residual stream for every slot of every head."""

    def __init__(self, module: GPT2LMHeadModel) -> None:
        self.body, self.module = module.transformer, module
        self.heads = module.config.n_head

    def __call__(
        self, tokens: Tensor, last: bool = True
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits (at the end alone), what every node wrote, and the input of every slot."""
        body, heads = self.body, self.heads
        width = body.wte.weight.shape[1]
        embed = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))
        embed = embed.detach().requires_grad_()
        stream, written, inputs = embed, [embed], []
        for block in body.h:
            copies = stream[:, None, None].expand(-1, 3, heads, -1, -1).clone()
            inputs.append(copies)
            weight = block.attn.c_attn.weight.view(width, 3, heads, -1)
            bias = block.attn.c_attn.bias.view(3, heads, 1, -1)
            q, k, v = torch.einsum("bshpm,mshd->sbhpd", block.ln_1(copies), weight) + bias[:, None]
            z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            out = block.attn.c_proj.weight.view(heads, -1, width)
            results = torch.einsum("bhpd,hdm->bhpm", z, out)
            written += list(results.unbind(1))
            stream = stream + results.sum(1) + block.attn.c_proj.bias
            entering = stream.clone()
            inputs.append(entering)
            written.append(block.mlp(block.ln_2(entering)))
            stream = stream + written[-1]
        inputs.append(stream)
        read = stream[:, -1:] if last else stream
        return self.module.lm_head(body.ln_f(read)), written, inputs

    def scores(self, probe: Probe, tight: bool = True) -> Tensor:
        """Mean score of every edge, target by target.

        Args:
            probe: pairs.
            tight: leave out whatever the scores do not need.
        """
        with torch.no_grad():
            other = torch.stack(self(probe.corrupt.tokens, tight)[1], 1)  # type: ignore[union-attr]
            if not tight:
                self(probe.tokens, tight)
        logits, written, inputs = self(probe.tokens, tight)
        total = difference(logits).sum()
        if tight:
            slopes = torch.autograd.grad(total, inputs)
        else:
            weights = [one for one in self.module.parameters() if one.requires_grad]
            found = torch.autograd.grad(total, inputs + weights, allow_unused=True)
            slopes = found[: len(inputs)]
        change = other - torch.stack(written, 1).detach()
        parts, before = [], 1
        for slope in slopes:
            if slope.ndim == 5:
                parts.append(self._times(change[:, :before], slope.flatten(1, 2)))
                before += self.heads
            else:
                parts.append(self._times(change[:, :before], slope[:, None]))
                before += 1
        return torch.cat(parts) / len(probe)

    @staticmethod
    def _times(change: Tensor, slope: Tensor) -> Tensor:
        return torch.einsum("bspm,btpm->ts", change, slope).flatten()


class LensWay:
    """The EAP-IG repository's way on a ``TransformerBridge``."""

    def __init__(self, module: GPT2LMHeadModel) -> None:
        self.bridge = bridge_over(module)
        self.bridge.set_use_attn_result(True)
        self.bridge.set_use_split_qkv_input(True)
        self.bridge.set_use_hook_mlp_in(True)
        self.layers, self.heads = module.config.n_layer, module.config.n_head
        self.width = module.config.n_embd
        self.parts: dict[str, Tensor] = {}

    def scores(self, probe: Probe) -> Tensor:
        """Mean score of every edge, target by target."""
        nodes = 1 + self.layers * (self.heads + 1)
        change = torch.zeros(*probe.tokens.shape, nodes, self.width)
        self.parts = {}
        with torch.no_grad():
            self.bridge.run_with_hooks(
                probe.corrupt.tokens,  # type: ignore[union-attr]
                fwd_hooks=self._writers(change, 1),
            )
            self.bridge(probe.tokens)
        with self.bridge.hooks(
            fwd_hooks=self._writers(change, -1), bwd_hooks=self._readers(change)
        ):
            difference(self.bridge(probe.tokens)).sum().backward()
        self.bridge.zero_grad()
        order = [f"blocks.{n}.hook_{s}" for n in range(self.layers) for s in _SLOTS]
        order.append(f"blocks.{self.layers - 1}.hook_resid_post")
        return torch.cat([self.parts[name].flatten() for name in order]) / len(probe)

    def _writers(self, change: Tensor, sign: int) -> list[tuple[str, Any]]:
        def add(at: Any) -> Any:
            def hook(value: Tensor, hook: Any) -> None:
                change[:, :, at].add_(value.detach(), alpha=sign)

            return hook

        found = [("blocks.0.hook_resid_pre", add(0))]
        for layer in range(self.layers):
            first = 1 + layer * (self.heads + 1)
            heads = slice(first, first + self.heads)
            found.append((f"blocks.{layer}.attn.hook_result", add(heads)))
            found.append((f"blocks.{layer}.hook_mlp_out", add(heads.stop)))
        return found

    def _readers(self, change: Tensor) -> list[tuple[str, Any]]:
        def multiply(name: str, before: int) -> tuple[str, Any]:
            def hook(slope: Tensor, hook: Any) -> None:
                slope = slope.detach() if slope.ndim == 4 else slope.detach()[:, :, None]
                self.parts[name] = torch.einsum("bpsm,bptm->ts", change[:, :, :before], slope)

            return name, hook

        found = []
        for layer in range(self.layers):
            before = 1 + layer * (self.heads + 1)
            for slot in _SLOTS:
                reach = before + self.heads * (slot == "mlp_in")
                found.append(multiply(f"blocks.{layer}.hook_{slot}", reach))
        last = self.layers - 1
        return [*found, multiply(f"blocks.{last}.hook_resid_post", change.shape[2])]


_SLOTS = ("q_input", "k_input", "v_input", "mlp_in")


def floor(module: GPT2LMHeadModel, probe: Probe) -> None:
    """Two runs of the model's own code and a backward pass, which every way needs."""
    with torch.no_grad():
        module(probe.corrupt.tokens, logits_to_keep=1)  # type: ignore[union-attr]
    embed = module.transformer.wte(probe.tokens).detach().requires_grad_()
    total = difference(module(inputs_embeds=embed, logits_to_keep=1).logits).sum()
    torch.autograd.grad(total, embed)


@torch.no_grad()
def hook_loop(module: GPT2LMHeadModel, probe: Probe, change: Tensor) -> Tensor:
    """The metric with one head's edge into the output taken out, one run per head.

    Args:
        module: the model.
        probe: its texts.
        change: what corruption changes in what every head writes, ``[batch head pos d_model]``.
    """
    found = []
    for one in change.unbind(1):
        hook = module.transformer.ln_f.register_forward_pre_hook(
            lambda _module, given, one=one: (given[0] + one,)
        )
        found.append(difference(module(probe.tokens).logits))
        hook.remove()
    return torch.stack(found)


def exact_output_edges(model: Any, module: GPT2LMHeadModel, probe: Probe) -> dict[str, Any]:
    """Seconds and agreement of both ways to all edges from nodes into the output."""
    study = EdgeMeasurement.of(model, probe, hs.metrics.logit_difference)
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = output_edges(study.batch(0), lambda _count: None)

    def theirs() -> None:
        found["theirs"] = hook_loop(module, probe, study.batch(0).change)

    timings = paired({"headscope": ours, "hook loop": theirs}, rounds=1, warm_up=0)
    return {
        "edges": len(found["ours"]),
        "examples": len(probe),
        "seconds": {name: one["median"] for name, one in timings.items()},
        "times_faster_than_a_hook_loop": ratio(timings, "hook loop", "headscope"),
        "largest_difference": float((found["ours"] - found["theirs"]).abs().max()),
    }


def main() -> None:
    """Print one JSON object."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--examples", type=int, default=32)
    asked.add_argument("--layers", type=int, default=12)
    asked.add_argument("--rounds", type=int, default=2)
    given = asked.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(n_layer=given.layers, initializer_range=0.1)
    module: Any = GPT2LMHeadModel(config).eval()
    model, probe = hs.load(module), texts(given.examples)
    usual, lens = UsualWay(module), LensWay(module)
    found: dict[str, Any] = {}

    def ours() -> None:
        found["headscope"] = torch.from_numpy(
            hs.edges.attribute(model, probe, hs.metrics.logit_difference, progress=False).mean
        )

    ours()
    ours_mb = peak_memory_mb()
    timings = paired(
        {
            "headscope": ours,
            "transformer-lens": lambda: found.update(lens=lens.scores(probe)),
            "written plainly": lambda: found.update(plain=usual.scores(probe, tight=False)),
            "tightest plain way": lambda: found.update(tight=usual.scores(probe)),
            "floor": lambda: floor(module, probe),
        },
        rounds=given.rounds,
        warm_up=0,
    )
    scores = found.pop("headscope")
    report(
        "edges",
        {
            "edges": len(scores),
            "examples": given.examples,
            "seconds": {name: one["median"] for name, one in timings.items()},
            "times_faster_than": {
                name: ratio(timings, name, "headscope") for name in timings if name != "headscope"
            },
            "largest_difference": {
                name: float((scores - other).abs().max()) for name, other in found.items()
            },
            "largest_score": float(scores.abs().max()),
            "peak_mb": {"headscope": ours_mb, "all": peak_memory_mb()},
            "exact edges into the output": exact_output_edges(
                model, module, probe.examples(slice(0, 2))
            ),
        },
    )


if __name__ == "__main__":
    main()
