"""Runs with everything in them, of any size, and runs whose every text is hostile."""

import numpy as np

from headscope.heads import HeadIndex
from headscope.plots import heatmap
from headscope.report import Picture, Rows, RunPart, Section
from headscope.report.joined import Partners, Side
from headscope.table import AttentionExample, HeadSpectra, HeadTable, Provenance
from tests.table.helpers import model_table, scores

HOSTILE = [
    "</script><script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    '"><svg onload=window.hit=1>',
    "<!--<script>",
    "\u202egpj.exe\u2028\u2029\u2066",
    "{{ 7 * 7 }} {% raw %}",
    "&lt;b&gt;",
    "x" * 10_000,
]


def run_of(layers: int, heads: int, tokens: int = 20) -> RunPart:
    """Every part of a report for this many heads, drawn at random."""
    rng = np.random.default_rng(0)
    table = model_table(layers, heads)
    facts = {"kv_heads": heads // 2, "provenance": next(iter(table.values())).provenance}
    more = [
        scores(f"score_{i}", rng.normal(0, 1, (layers, heads)), bounds=(None, None), **facts)
        for i in range(16)
    ]
    roles = rng.uniform(0, 1, (2, layers, heads)) ** 6
    more += [
        scores(name, one, threshold=0.4, **facts)
        for name, one in zip(("duplicate_token", "first_token"), roles, strict=True)
    ]
    every = tuple(HeadIndex(layer, head) for layer in range(layers) for head in range(heads))
    raw = np.tril(rng.uniform(0, 1, (len(every), tokens, tokens)) ** 8)
    side = Side(
        rng.integers(0, len(every), (len(every), 5)), np.sort(rng.uniform(0, 1, (len(every), 5)))
    )
    values = np.sort(rng.uniform(0, 3, (layers, heads, 32)))[..., ::-1]
    band = np.linspace(1, 0.2, 32)
    direction = {"size": 2.5, "reads": [["a", "b"], ["c"]], "writes": [["d"], ["e", "f"]]}
    return RunPart(
        "all",
        "scan",
        table.join(HeadTable(more)),
        partners=Partners(("K_composition", "Q_composition"), (side, side), (side, side)),
        spectra=[HeadSpectra("OV", values, np.ones((layers, heads)), band * 0.8, band)],
        words={"OV": {str(head): [direction] for head in every}},
        attention=AttentionExample.of(
            every, [f"t{i}" for i in range(tokens)], raw / raw.sum(-1, keepdims=True), "random"
        ),
    )


def hostile_run(plain: str | None) -> RunPart:
    """A run whose texts all want to be more than text, or the same with plain texts."""
    texts = HOSTILE if plain is None else [plain] * len(HOSTILE)
    origin = Provenance(model=texts[0], revision=texts[1], probe={texts[0]: texts[1]})
    facts = {"provenance": origin, "unit": texts[1], "description": texts[2], "source": texts[0]}
    table = HeadTable(
        [scores(f"{i}{text[:60]}", threshold=0.5, **facts) for i, text in enumerate(texts)]
    )
    heads = tuple(HeadIndex(i, j) for i in range(2) for j in range(2))
    side = Side(np.array([[1], [2], [3], [0]]), np.full((4, 1), 0.5))
    direction = {"size": 1.0, "reads": [texts, texts], "writes": [texts, texts]}
    figure = heatmap(table[next(iter(table))])
    return RunPart(
        texts[0],
        texts[1],
        table,
        command=texts[2],
        config=texts[3],
        facts={texts[0]: texts[1]},
        sections=[
            Section(texts[0], [Rows(texts[:2], [(texts[0], tuple(texts))], texts[1]),
                               Picture(figure, figure, texts[0], texts[1])]),
        ],
        partners=Partners((texts[0],), (side,), (side,)),
        spectra=[
            HeadSpectra(texts[0], np.ones((2, 2, 1)), np.ones((2, 2)), np.ones(1), np.ones(1))
        ],
        words={texts[0]: {str(head): [direction] for head in heads}},
        says={str(head): (texts, texts) for head in heads},
        attention=AttentionExample.of(
            heads, texts, np.tril(np.full((4, len(texts), len(texts)), 0.5)), texts[1]
        ),
        failed={texts[0]: texts[1]},
    )  # fmt: skip
