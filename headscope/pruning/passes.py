"""Batches for forward and backward passes: nothing is recorded for replay."""

from collections.abc import Iterator

from headscope.ablation.engine import Batch
from headscope.ablation.run import Study
from headscope.ablation.sources import ForwardSource


def whole_batches(study: Study) -> Iterator[tuple[slice, Batch]]:
    """Batches of a study's probe with the examples they hold, in order, ready for whole passes.

    Batches of which the metric reads nothing are left out.
    """
    reads = study.metric.reads(study.probe)
    for start in range(0, len(study.probe), study.size):
        chosen = slice(start, min(start + study.size, len(study.probe)))
        part, read = study.probe.examples(chosen), reads[chosen]
        if bool(read.any()):
            source = ForwardSource(study.model, part.tokens, part.real, read)
            yield chosen, Batch(part, study.metric, source, read, study.limit)
