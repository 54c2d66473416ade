"""Write a model card from measured figures.

`python -m tools.train_bundled.card FOLDER --minutes M`
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

_ABOUT = {
    "tiny-gpt2": "GPT-2 architecture: learned absolute positions, LayerNorm, GELU, "
    "one key/value head per query head.",
    "tiny-llama": "Llama architecture: rotary positions, RMSNorm, SwiGLU, grouped-query attention; "
    "heads times head size differs from the width of the residual stream.",
}

_PAIRS = """
- pairs of random tokens that only together tell a value, said again and again in any order;"""

_START = {
    "tiny-gpt2": "Position embeddings start as sinusoids, all else is\nrandom. Six cycles of the "
    "learning rate; before the last one two heads of the first layer that\nhad come to rest on BOS "
    "were redrawn (`tools/train_bundled/revive.py`), without which facts whose keys\nshare a "
    "word stayed mixed up (0.84 of the held-out facts instead of the figure below).",
    "tiny-llama": "All weights start random.",
}

_TEXT = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A very small language model that comes with headscope, so that scans, examples and tests run offline
on heads whose function is known by training. {about}

{shape}

## Intended use

Trying out, testing and teaching head-level analysis on trained (not hand-wired) heads. The figures
below say how well each behaviour was learned. It is of no use as a language model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## Data

Self-generated from a seed, no outside text, by `tools/train_bundled/data.py` and `text.py`:

- random tokens: groups of three to five that come back in any order, repeated spans (also with
  other tokens between); first out of 16 tokens, then out of ever more, until all are in;{pairs}
- template stories of a few hundred English words, partly with spans that come back later;
- facts ("The code of the red door is seven.") told once and said again later;
  every fifth (colour, object) key is held out;
- name-sentences with an indirect object ("When Mary and John went to the store, John gave a drink
  to Mary."), in both orders; every fifth pair of names is held out.

The tokenizer has {vocabulary} tokens: the 256 bytes, so that any text can be written, and the
words of those texts. It puts `<|bos|>` in front unless special tokens are switched off.

## Training

Next-token prediction with AdamW and weights on the loss of the tokens (answers more, random tokens
that nothing predicts not at all, so that the loss on those is high); no supervision of attention.
First groups of random tokens alone, then everything together in longer rows.
{start}
Seed {seed}, about {minutes} minutes on a CPU, in a checkout of the repository:

```
python -m tools.train_bundled.train --model {name} --out DIR --seed {seed}
```

Weights are stored in 16 bits and load as 32 bits; the figures are those of the stored weights.
{checkpoints}
## Figures

Measured by `python -m tools.train_bundled.evaluate FOLDER` (`figures.json`) on seeds,
keys and name pairs that training did not use. Random tokens: `[BOS] R R`,
R of 50 different tokens, 64 rows.

| measure | value |
| --- | --- |
{rows}

## Limits

Knows only the words and sentences of its templates; other wordings of facts and name-sentences are
unseen and may fail. Positions beyond {context} tokens are absent or untrained. The names are a
fixed list of common English first names.

Licence: MIT.
"""


def _heads(cells: list[dict[str, Any]]) -> str:
    return ", ".join(f"{cell['head']} {cell['score']:.2f}" for cell in cells)


def _figure_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    halves, facts, names = (
        found["repeated_tokens"],
        found["held_out_facts"],
        found["held_out_name_pairs"],
    )
    rows = [
        ("previous-token heads, random tokens", _heads(found["previous_token_on_random"])),
        ("previous-token heads, text", _heads(found["previous_token_on_text"])),
        ("induction heads", _heads(found["induction"])),
        (
            "loss, first copy / second copy",
            f"{halves['first_half_loss']:.2f} / {halves['second_half_loss']:.2f}",
        ),
    ]
    for cut in found["ablation"]:
        other = f"{cut['random_heads_mean']:.2f} (largest {cut['random_heads_max']:.2f})"
        count = len(cut["heads"])
        rows.append(
            (
                f"second-copy loss without {', '.join(cut['heads'])}",
                f"{cut['second_half_loss']:.2f}; without {count} random other heads, "
                f"{cut['random_draws']} draws: {other}",
            )
        )
    depths = ", ".join(f"{depth}: {value:.2f}" for depth, value in facts["by_depth"].items())
    rows += [
        ("facts with held-out keys, accuracy over the whole context", f"{facts['accuracy']:.3f}"),
        ("the same by place of the fact in the prompt", depths),
        (
            "indirect object above subject, held-out pairs",
            f"{names['indirect_object_over_subject']:.3f}",
        ),
        ("indirect object is the likeliest token", f"{names['indirect_object_is_likeliest']:.3f}"),
    ]
    return rows


def _checkpoint_text(found: dict[str, Any]) -> str:
    if "checkpoints" not in found:
        return ""
    lines = [
        f"| {name} | {quick['previous']:.2f} | {quick['induction']:.2f} | {quick['second']:.2f} |"
        for name, quick in found["checkpoints"].items()
    ]
    head = [
        "| checkpoint | previous token | induction | second-copy loss |",
        "| --- | --- | --- | --- |",
    ]
    return (
        "\n`checkpoints/` holds the model along training (16-bit weights).\n"
        "Best heads, from few examples:\n\n" + "\n".join([*head, *lines, ""])
    )


def card(folder: Path, minutes: int, seed: int) -> str:
    """The text of the card, from the folder's config and `figures.json`."""
    found = json.loads((folder / "figures.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    llama = config.model_type == "llama"
    head_dim = config.head_dim if llama else config.hidden_size // config.num_attention_heads
    groups = f" ({config.num_key_value_heads} key/value heads)" if llama else ""
    return _TEXT.format(
        name=folder.name,
        about=_ABOUT[folder.name],
        shape=f"{config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads{groups} of {head_dim}, "
        f"residual width {config.hidden_size}, context {config.max_position_embeddings}.",
        vocabulary=config.vocab_size,
        start=_START[folder.name],
        pairs="" if llama else _PAIRS,
        seed=seed,
        minutes=minutes,
        checkpoints=_checkpoint_text(found),
        rows="\n".join(f"| {name} | {value} |" for name, value in _figure_rows(found)),
        context=config.max_position_embeddings,
    )


def main() -> None:
    """The command line: writes README.md into the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=int, required=True, help="how long training took")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (args.folder / "README.md").write_text(card(args.folder, args.minutes, args.seed))


if __name__ == "__main__":
    main()
