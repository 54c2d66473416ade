"""What measuring the layers of 1,000 texts costs beside the passes alone; prints JSON of one run.

Random weights of GPT-2 small, texts of 128 tokens, one thread; CPU seconds, so that a busy machine
changes little. Few texts are timed, without ``linearity``: that takes the first ``32 * d_model``
tokens alone, so it is timed by itself and its share in 1,000 texts is worked out.
"""

import torch
from support import cpu_seconds, gpt2_small, report

import headscope as hs
from headscope.geometry import measures as gm
from headscope.geometry.layers import TEXT_MEASURES

TIMED, TEXTS, LENGTH, MOST = 8, 1000, 128, 1.3


def main() -> None:
    """Compare, and fail where measuring costs too much."""
    torch.set_num_threads(1)
    model = hs.load(gpt2_small())
    d_model = model.shape.d_model
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.shape.d_vocab, (TIMED, LENGTH), generator=draw)
    probe = hs.probes.from_tokens(tokens)
    last = hs.Tap("resid_post", model.shape.n_layers - 1)
    by_text = list(TEXT_MEASURES)
    hs.geometry.layers(model, probe.examples(slice(0, 2)), measures=by_text)
    moments, x = gm.LinearMoments(d_model), torch.randn(TIMED * LENGTH, d_model, generator=draw)
    passes, measured, linear = (
        seconds / TIMED
        for seconds in cpu_seconds(
            lambda: model.run(probe, until=last),
            lambda: hs.geometry.layers(model, probe, measures=by_text),
            lambda: [moments.add(x, x) for _ in range(model.shape.n_layers)],
        )
    )
    linear *= min(1.0, 32 * d_model / (TEXTS * LENGTH))
    ratio = (measured + linear) / passes
    report(
        "geometry",
        {
            "texts": TEXTS,
            "passes_s_per_text": passes,
            "measures_s_per_text": measured - passes,
            "linearity_s_per_text": linear,
            "times_the_passes": ratio,
        },
    )
    if ratio > MOST:
        raise SystemExit(f"measuring takes {ratio:.2f} times the passes")


if __name__ == "__main__":
    main()
