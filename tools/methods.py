"""Hold every method against compiled models, and write docs/methods.md.

    python -m tools.methods

Takes about ten minutes on one core.
"""

import warnings
from pathlib import Path

from headscope.compiled import CASES, QUESTIONS, Benchmark, benchmark

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"

_HEAD = """\
# Methods against the truth

<!-- Written by `python -m tools.methods`. -->

`hs.compiled.benchmark()` runs every method of headscope on {models} exact models (see [Exact
models](howto/exact-models.md)) and compares its ranking of heads, edges or pairs of heads with the
truth, which follows from the program. AUROC is the share of pairs of a true and another head (or
edge, or pair) in which the true one is ranked higher. Ties count as mistakes. Chance is 0.5.
*Exact* is the share of models in which all true ones rank first, and *refused* counts models on
which the method raises an error that explains why it does not apply.

The models are GPT-2s and Llamas, with and without grouped heads, most with a hidden rotation of the
residual stream. All have noise heads, whose output is not read. In one respect they are harder than
trained models: attention is saturated, so gradients through it vanish.

## Questions

{questions}

## Results

{table}

## Where methods fail, and why

- **Attribution** (one gradient at the clean run, zero or mean baseline; the head sums of `eap` are
  the same numbers) detects only heads after the last saturated softmax. An earlier head acts
  through queries and keys, and there the gradient is 0. Integrated gradients over inputs
  (`eap_ig`) detect it, because the path from the corrupt to the clean embedding crosses the point
  where attention changes.
- **Integrated gradients of head outputs** interpolate all heads together from the clean run to the
  mean. Half-way, the output of the earlier head of a pair is so small that the later head attends
  elsewhere and writes something harmful; for the rest of the path its derivative has the wrong
  sign. The head sums of `eap_ig` can become negative for the same reason (*two back*).
- **Gates, learned and causal,** start nearly open and follow the gradient of the loss, but here
  the loss is a step function: attention and lookup tables give the same word over a range of
  inputs. Inside the range the gradient is 0, so only the penalty moves the gate; past its edge the
  gradient is 0 again, so nothing moves it back. *Regression* gives the same answer with either
  head scaled to 0.88 and a completely wrong one with either at 0.5, so the gates close both. The
  first head of *pointer* and *recall* is lost in the same way, because only a softmax reads it.
- **Gradient importance** takes the size of the same gradient, which is rounding where the loss is
  flat (*regression*).
- **On route** counts whether a head is on a drawn route, however little it carries, and routes are
  drawn by the size of what is written, read or not: noise heads that write are on routes as often
  as true ones. Where the constant that keeps norms fixed dwarfs every head, no route holds a head,
  and all tie at 0, which counts as a mistake.
- **Information flow** also follows the size of what is written, and the same constant makes its
  shares tiny. Trained models have no such constant.
- **Output norm, weight norm, confidence** measure size or sharpness, not use: a head with a large
  output that is never read (*bystanders*) ranks with those that matter, and a noise head is as
  sharp as any other.
- **Direct attribution** measures what a head writes to the logits, and not its effect through later
  heads.
- **Contextual decomposition** freezes attention patterns, so it detects what heads pass on through
  values, and not through the queries and keys of others.
- **Edges by patching** with a paired text cannot detect what both texts share, above all positions;
  the truth counts such edges. Zero and mean ablation detect them.
- **Edges by mean ablation** cannot detect what is the same in all texts, such as the constant that
  the query of *largest* reads.
- **Edges by zero ablation** of the embedding also take away the constant that keeps norms fixed, so
  that everything else the reader sees is rescaled; in *regression* that moves the answer more than
  any true edge does.
- **Edges by one gradient, or by rules for gradients** (`eap`, `relp`, `gim`) meet the saturated
  softmax again: edges into queries and keys get nearly nothing, and tie with edges of noise heads.
- **Subspace affinity** counts all directions of a subspace alike, however little a head uses them,
  and noise heads read all of theirs.
- **Redundant heads** are asked about apart: ablating one alone shows little by construction.
- **Refusals.** Direct attribution refuses where the parts of a logit do not sum to it within
  rounding, since the constant that keeps norms fixed enters each part. Copying and matching scores
  refuse models whose tokens do not enter the first block as rows of the embedding.

The three that do worst, *chance* and *confidence* apart, are attribution, contextual decomposition
and on route: the first two by what saturated attention hides from them, which trained models
soften, and the last by what it counts.

## Not asked

Descriptive scores (entropy, distance, spectra, ranks) have no right answer here, except QK ranks,
which the tests compare with the programs. Long-context scores need a tokenizer.

## Add your own method

```python
import headscope as hs
from headscope.compiled import Method


def loudest(case):
    return hs.pruning.output_norm(case.made.model, case.probe).mean


mine = Method("loudest", asks="used", answer=loudest)
found = hs.compiled.benchmark(["ablation, mean"], hs.compiled.CASES[:2], extra=[mine])
found.by_method()  # one row per method: median AUROC, lowest, exact, seconds
```
"""


def page(found: Benchmark) -> str:
    """The page, with the results of a benchmark."""
    questions = "\n".join(f"- *{name}*: {one.text}" for name, one in QUESTIONS.items())
    return _HEAD.format(models=len(CASES), questions=questions, table=found.to_markdown())


def main() -> None:
    """Run all methods on all models and write the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = benchmark()
    PAGE.write_text(page(found), encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
