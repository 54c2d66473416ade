"""Edge attribution patching against its usual way; prints JSON ratios of one run.

GPT-2 small's shape with random weights, pairs of random texts that differ in a few tokens. The
usual way gives every slot of every head a copy of the residual stream of its own, keeps the
gradient at each copy, and multiplies it with the change of every earlier node. Scores are compared
while they are timed; works take turns. ``--examples`` and ``--layers`` make it smaller.
"""

import argparse
from dataclasses import replace
from typing import Any

import torch
from support import paired, peak_memory_mb, ratio, report
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import headscope as hs
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


class UsualWay:
    """GPT-2 with a copy of the residual stream for every slot of every head."""

    def __init__(self, module: GPT2LMHeadModel) -> None:
        self.body, self.module = module.transformer, module
        self.heads = module.config.n_head

    def __call__(self, tokens: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits at the end, what every node wrote, and the input of every slot."""
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
        return self.module.lm_head(body.ln_f(stream[:, -1])), written, inputs

    def scores(self, probe: Probe) -> Tensor:
        """Mean score of every edge, target by target."""
        with torch.no_grad():
            other = torch.stack(self(probe.corrupt.tokens)[1], 1)  # type: ignore[union-attr]
        logits, written, inputs = self(probe.tokens)
        total = (logits[:, 1000] - logits[:, 2000]).sum()
        slopes = torch.autograd.grad(total, inputs)
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


def main() -> None:
    """Print one JSON object."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--examples", type=int, default=32)
    asked.add_argument("--layers", type=int, default=12)
    asked.add_argument("--rounds", type=int, default=3)
    given = asked.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(n_layer=given.layers, initializer_range=0.1)
    module: Any = GPT2LMHeadModel(config).eval()
    model, probe, usual = hs.load(module), texts(given.examples), UsualWay(module)
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = hs.edges.attribute(
            model, probe, hs.metrics.logit_difference, progress=False
        ).mean

    def theirs() -> None:
        found["theirs"] = usual.scores(probe)

    ours()
    ours_mb = peak_memory_mb()
    timings = paired({"headscope": ours, "usual way": theirs}, rounds=given.rounds)
    difference = (torch.from_numpy(found["ours"]) - found["theirs"]).abs().max()
    report(
        "edges",
        {
            "edges": len(found["ours"]),
            "examples": given.examples,
            "seconds": {name: one["median"] for name, one in timings.items()},
            "times_faster_than_the_usual_way": ratio(timings, "usual way", "headscope"),
            "largest_difference": float(difference),
            "largest_score": float(found["theirs"].abs().max()),
            "peak_mb": {"headscope": ours_mb, "both": peak_memory_mb()},
        },
    )


if __name__ == "__main__":
    main()
