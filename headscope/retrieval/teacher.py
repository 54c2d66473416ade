"""The teacher-forced form, run by run: one forward pass of a text with its answer appended."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.capture import check_fits, chunks
from headscope.memory import chunk_bytes
from headscope.models.protocol import HeadModel, LayerView
from headscope.probes.probe import Probe
from headscope.retrieval.follow import RECALL, answered, unbroken
from headscope.retrieval.passes import each_run, need_marks
from headscope.retrieval.runs import Run, Runs


def follow_forced(
    model: HeadModel,
    probe: Probe,
    *,
    threshold: int | float = RECALL,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Runs:
    """Let a model read every example with its answer, and see who would copy each token of it.

    One fused forward pass a text, rows only of the queries that predict the answer: the
    teacher-forced form of :func:`headscope.retrieval.follow`, whose runs these equal where greedy
    decoding says just the answer. A run's ``tokens`` are the answer's; its ``response`` is what
    the model would say at each of them, given the right ones before.

    Args:
        model: the model.
        probe: of kind ``needle``: with the marks ``end``, ``answering`` and ``needle_answer``.
        threshold: recall above which a run is called answered; all are scored.
        batch_size: examples at a time, of equal prompts; default: about 8192 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the probe has no such marks or does not fit the model.
    """
    check_fits(model, probe)
    need_marks(probe, "end", "answering", "needle_answer")
    return each_run(
        model,
        probe,
        lambda rows: _read(model, probe, rows),
        form="forced",
        threshold=threshold,
        batch_size=batch_size,
        progress=progress,
    )


@dataclass
class _Looked:
    """Sees where each head looks most from some positions."""

    positions: Int[Tensor, " query"]
    needle: Bool[Tensor, "batch pos"]
    windows: tuple[int | None, ...]
    budget: int
    best: dict[int, Int[Tensor, "batch head query"]] = field(default_factory=dict)
    reachable: dict[int, Bool[Tensor, "batch query"]] = field(default_factory=dict)
    wants_final: bool = False

    def on_layer(self, view: LayerView) -> None:
        """Keep one argmax a head and query; of equals the first."""
        batch, length = self.needle.shape
        row = 4 * batch * view.z.shape[2] * length
        best, shown = [], []
        for positions in chunks(self.positions, row, self.budget):
            rows = view.rows(positions)
            best.append(rows.pattern.argmax(-1).cpu())
            if self.windows[view.layer] is not None:
                visible = rows.visible.cpu()
                marked = self.needle[:, None, : visible.shape[-1]]
                shown.append((visible & marked).any(-1))
        self.best[view.layer] = torch.cat(best, 2)
        if shown:
            self.reachable[view.layer] = torch.cat(shown, 1)

    def on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Unused."""


def _read(model: HeadModel, probe: Probe, rows: list[int]) -> list[Run]:
    """Runs of some examples, in one pass."""
    used = probe.real[rows].any(0).nonzero().flatten()
    columns = slice(int(used[0]), int(used[-1]) + 1)
    tokens, real, targets, answering, needle = (
        values[rows, columns]
        for values in (
            probe.tokens,
            probe.real,
            probe.targets,
            probe.mark("answering"),
            probe.mark("needle_answer"),
        )
    )
    positions = answering.any(0).nonzero().flatten()
    looked = _Looked(positions, needle, model.shape.windows, chunk_bytes(model.device, None))
    with torch.no_grad():
        logits = model.forward(tokens, real=real, observers=(looked,), logits_at=positions)
    predicted = logits.argmax(-1).cpu()
    runs = []
    for i in range(len(rows)):
        asked = answering[i, positions]
        wanted = targets[i, positions[asked]]
        shape = (len(wanted), model.shape.n_layers)
        copied, reachable = np.zeros((*shape, model.shape.n_heads), bool), np.ones(shape, bool)
        inside = tokens[i].masked_fill(~needle[i], -1)  # the needle's tokens where they stand
        for layer, best in looked.best.items():
            copied[:, layer] = (inside[best[i][:, asked]] == wanted).T.numpy()
            if layer in looked.reachable:
                reachable[:, layer] = looked.reachable[layer][i, asked].numpy()
        said = predicted[i, asked].tolist()
        reply = answered(model, said, unbroken(tokens[i], needle[i]))
        key = tuple(tokens[i, needle[i]].tolist())
        runs.append(
            Run(
                tuple(wanted.tolist()),
                reply.said,
                reply.recall,
                key,
                copied,
                reachable,
                reply.wanted,
            )
        )
    return runs
