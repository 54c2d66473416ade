"""The Attention Lens: a learned map from each head's output to the vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.result import Glance, Shown
from headscope.errors import InputError
from headscope.heads import ModelShape
from headscope.lens.attribution import row_positions
from headscope.lens.fitting import (
    Data,
    Descent,
    FitReport,
    Judge,
    LensConfig,
    divergence_of_lens,
    in_turn,
    save_lens,
    split_data,
)
from headscope.lens.logit import head_words
from headscope.lens.reading import (
    Promptish,
    constants,
    logits_added,
    logits_of,
    read_prompt,
    row_chunks,
)
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import BlockStates, Reads, TapView, at_blocks, at_final, at_layers
from headscope.probes.probe import Probe
from headscope.table.lens import HeadWords


@dataclass
class HeadStreams:
    """Reader that keeps head outputs and the final residual stream.

    Attributes:
        z: by layer, divided by the scales of a norm after attention and of the final norm.
        final: last residual stream.
        example: example of each token.
    """

    model: HeadModel
    layers: tuple[int, ...]
    example: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    z: dict[int, Float[Tensor, "token head d_head"]] = field(default_factory=dict)
    final: Float[Tensor, "token d_model"] = field(default_factory=lambda: torch.empty(0, 0))

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: head outputs, the norms after them, and the input of the final norm."""
        layers = at_layers(shape, self._on_layer)
        return layers | at_blocks(shape, self._on_block) | at_final(self._on_final)

    def _on_layer(self, view: TapView) -> None:
        """Store the outputs of a chosen layer."""
        if view.layer in self.layers:
            self.z[view.layer] = view.z[self.example, self.position].float()

    def _on_block(self, states: BlockStates) -> None:
        """Divide by the scale of a norm after attention."""
        if states.layer in self.z and states.head_sum is not None:
            write = self.model.parts.attention_write(states.layer)
            scale = write.scale(states.head_sum[self.example, self.position])
            self.z[states.layer] = self.z[states.layer] / scale[:, None, None]

    def _on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Divide by the scale of the final norm."""
        self.final = residual[self.example, self.position].float()
        scale = self.model.unembedding.scale(self.final)
        self.z = {layer: z / scale[:, None, None] for layer, z in self.z.items()}


@torch.no_grad()
def head_streams(model: HeadModel, batch: Probe, layers: tuple[int, ...]) -> HeadStreams:
    """Run a batch and return its streams."""
    example, position = (one.to(model.device) for one in row_positions(batch.real))
    seen = HeadStreams(model, layers, example, position)
    model.run(batch, reads=seen.reads(model.shape), logits_at=torch.empty(0, dtype=torch.long))
    return seen


@dataclass(frozen=True, eq=False, repr=False)
class AttentionLens(Shown):
    """Learned map from each head's output to the vocabulary.

    Head h of a layer reads as ``z_h (W_O_h D.T + inner_h outer_h) / s``: the plain direct path (D:
    residual directions of the logits) and a learned correction; s contains the scales of the final
    norm and of a norm after attention. A layer reads as the sum over its heads, ``shift``, and the
    biases of the model's unembedding. Since a head's output has d_head dimensions, rank d_head
    covers every linear map from it to the vocabulary.

    Attributes:
        layers: layers with a lens.
        inner, outer: factors of every head's correction.
        shift: bias of every layer.
        report: held-out loss and that of the plain direct path, one row per layer.
        model: name of the model that it belongs to.
        digest: digest of its weights.
        settings: settings of the fit, as JSON values.

    Example:
        >>> lens = hs.lens.attention_lens(model, probe, layers=[0], rank=2, steps=1)
        >>> words = lens.read(model, [5, 9, 5, 9], k=3)
        >>> len(words.promoted("L0H0")), len(words.suppressed("L0H0"))
        (3, 3)
    """

    layers: tuple[int, ...]
    inner: Float[Tensor, "layer head d_head rank"]
    outer: Float[Tensor, "layer head rank d_vocab"]
    shift: Float[Tensor, "layer d_vocab"]
    report: FitReport | None
    model: str
    digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    title = "attention lens"

    @torch.no_grad()
    def read(
        self, model: HeadModel, prompt: Promptish, position: int = -1, *, k: int = 10
    ) -> HeadWords:
        """Read the tokens that every head promotes and suppresses at one position.

        Like :func:`headscope.lens.head_lens`, which is the same with a correction of 0.

        Raises:
            InputError: if the lens belongs to another model, or the prompt does not fit.
        """
        self.check(model)
        if k < 1:
            raise InputError(f"k={k}: give 1 or more.")
        text = read_prompt(model, prompt)
        at = text.at(position)
        seen = head_streams(model, text.probe, self.layers)
        pieces = (
            self.by_head(model, place, seen.z[layer][at : at + 1])[0]
            for place, layer in enumerate(self.layers)
        )
        return head_words(model, text, at, self.layers, pieces, k)

    def by_head(
        self, model: HeadModel, place: int, z: Float[Tensor, "token head d_head"]
    ) -> Float[Tensor, "token head d_vocab"]:
        """Logits of single heads, from outputs divided by the scales."""
        plain = logits_added(model.unembedding, writes(model, self.layers[place], z).flatten(0, 1))
        inner, outer = (one[place].to(z.device) for one in (self.inner, self.outer))
        change = einsum(
            z, inner, outer,
            "token head d_head, head d_head rank, head rank d_vocab -> token head d_vocab",
        )  # fmt: skip
        return rearrange(plain, "(token head) v -> token head v", head=z.shape[1]) + change

    def check(self, model: HeadModel) -> None:
        """Raise InputError if the lens belongs to another model."""
        if model.digest() != self.digest:
            raise InputError(
                f"this {self.title} was fitted to {self.model}, and {model.name} has other weights."
            )

    def save(self, folder: "str | PathLike[str]") -> None:
        """Write ``lens.safetensors`` and ``config.json`` into a folder, each atomically."""
        tensors = {"inner": self.inner, "outer": self.outer, "shift": self.shift}
        facts = LensConfig(
            kind="attention",
            model=self.model,
            digest=self.digest,
            settings={**self.settings, "layers": list(self.layers)},
            report={} if self.report is None else self.report.to_json(),
        )
        save_lens(folder, tensors, facts)

    def judged(self, report: FitReport) -> "AttentionLens":
        """The same lens with its report."""
        return replace(self, report=report)

    def glance(self) -> Glance:
        """Show the held-out loss of every layer."""
        title = f"{self.title} of {self.model}"
        return Glance(title) if self.report is None else replace(self.report.glance(), title=title)

    def __repr__(self) -> str:
        """Describe the lens and its held-out gain."""
        return f"<{self.title} of {self.model}: {self.report or 'not judged'}>"


def writes(
    model: HeadModel, layer: int, z: Float[Tensor, "token head d_head"]
) -> Float[Tensor, "token head d_model"]:
    """Contribution of scaled outputs to the residual stream."""
    write = model.parts.attention_write(layer)
    plain = einsum(
        z, model.output_weights(layer).float(),
        "token head d_head, head d_head d_model -> token head d_model",
    )  # fmt: skip
    return write.vectors(plain, torch.ones_like(plain[..., 0]))


def layer_logits(
    model: HeadModel,
    layer: int,
    z: Float[Tensor, "token head d_head"],
    biases: Float[Tensor, " d_vocab"],
) -> Float[Tensor, "token d_vocab"]:
    """Logits of a layer's heads on the plain direct path, before a soft cap."""
    return logits_added(model.unembedding, writes(model, layer, z).sum(1)) + biases


def correction(
    z: Float[Tensor, "token head d_head"],
    inner: Float[Tensor, "head d_head rank"],
    outer: Float[Tensor, "head rank d_vocab"],
    shift: Float[Tensor, " d_vocab"],
) -> Float[Tensor, "token d_vocab"]:
    """Contribution of the learned part to a layer's logits."""
    held = einsum(z, inner, "token head d_head, head d_head rank -> token head rank")
    return held.flatten(1) @ outer.flatten(0, 1) + shift


@checked
@own_types()
@torch.enable_grad()
def attention_lens(
    model: HeadModel,
    probe: Probe | None = None,
    layers: Sequence[int] | None = None,
    *,
    rank: int | None = 8,
    steps: int = 250,
    learning_rate: float = 1e-3,
    held_out: float = 0.2,
    seed: int = 0,
    checkpoint: "str | PathLike[str] | None" = None,
    progress: bool | None = None,
) -> AttentionLens:
    """Fit a map from every head's output to the vocabulary, to predict the model's output.

    The loss of a layer is ``KL(model || sum over its heads)`` per token, in nats, by Adam, as in
    the paper. Unlike there, every token counts, not only the last; the fit starts from the direct
    path with the scales of this run instead of a bare W_U, and adds the unembedding's bias once and
    not per head; and the learned part of a head has a small rank, as a full map from d_model takes
    ``heads * d_model * vocabulary`` numbers per layer (463 million in GPT-2 small, 5 million at
    rank 8). Fitting takes 16 bytes for each.

    Args:
        model: from :func:`headscope.load`.
        probe: text to fit to; default: the bundled passages, which are few: pass more.
        layers: default: all with attention.
        rank: rank of each head's learned part; None: all of the head's d_head dimensions.
        steps: optimiser steps.
        learning_rate: initial rate; it falls linearly.
        held_out: share of the examples that is held out for the report.
        seed: seed of the split and of the initial values.
        checkpoint: file that stores the fit every 20 seconds, from which the same call resumes
            after an interruption, with identical results; default: none.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the data does not fit the model, a number is out of range, or the checkpoint
            belongs to another fit.

    Source: Sakarvadia et al. 2023, "Attention Lens", arXiv 2310.16270.

    Example:
        >>> lens = hs.lens.attention_lens(model, probe, layers=[0], rank=2, steps=1)
        >>> lens.inner.shape == (1, model.shape.n_heads, model.shape.d_head, 2)
        True
        >>> lens.report.rows
        ('L0',)
    """
    options = RunOptions(seed=seed, progress=progress)
    if steps < 1 or learning_rate <= 0 or (rank is not None and rank < 1):
        raise InputError(
            f"steps, learning_rate and rank must be positive; got {steps}, {learning_rate}, {rank}."
        )
    chosen = tuple(model.shape.attention_layers if layers is None else layers)
    for layer in chosen:
        if layer not in model.shape.attention_layers:
            raise InputError(f"{model.name} has no attention in layer {layer}.")
    if not chosen:
        raise InputError("no layers given: name at least one, or leave them out for all.")
    data = split_data(model, probe, held_out, seed)
    inner, outer, shift = _start(model, len(chosen), rank, seed)
    learned = [outer, shift] if rank is None else [inner, outer, shift]
    parameters = [one.requires_grad_() for one in learned]
    biases = constants(model.unembedding)
    settings = {
        "rank": rank,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
        **data.facts,
    }
    facts = {"lens": "attention", "model": model.digest(), "layers": chosen, **settings}
    Descent(steps, learning_rate, checkpoint, facts, options).run(
        f"attention lens of {model.name}",
        data,
        parameters,
        lambda batch, _step: _descend(model, batch, chosen, (inner, outer, shift), biases),
    )
    lens = AttentionLens(
        layers=chosen,
        inner=inner.detach().cpu(),
        outer=outer.detach().cpu(),
        shift=shift.detach().cpu(),
        report=None,
        model=model.name,
        digest=model.digest(),
        settings=settings,
    )
    return lens.judged(held_out_losses(model, data, lens))


def _start(
    model: HeadModel, layers: int, rank: int | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Initial factors with product 0; at full rank the inner factor is the identity and fixed."""
    shape, device = model.shape, model.device
    size = shape.d_head if rank is None else min(rank, shape.d_head)
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(
        layers, shape.n_heads, shape.d_head, size, generator=generator, dtype=torch.float32
    )
    inner = inner / shape.d_head**0.5
    if rank is None:
        inner = torch.eye(size, dtype=torch.float32).expand_as(inner).clone()
    outer = torch.zeros(
        layers, shape.n_heads, size, shape.d_vocab, dtype=torch.float32, device=device
    )
    return inner.to(device), outer, torch.zeros(layers, shape.d_vocab, device=device)


def _descend(
    model: HeadModel,
    batch: Probe,
    layers: tuple[int, ...],
    parts: tuple[Tensor, Tensor, Tensor],
    biases: Float[Tensor, " d_vocab"],
) -> None:
    """Accumulate gradients of every layer's mean loss on a batch, a few tokens at a time."""
    seen, unembedding = head_streams(model, batch, layers), model.unembedding
    for chosen in row_chunks(len(seen.final), unembedding):
        with torch.no_grad():
            final = logits_of(unembedding, seen.final[chosen]).log_softmax(1)
        for place, layer in enumerate(layers):
            z = seen.z[layer][chosen]
            with torch.no_grad():
                plain = layer_logits(model, layer, z, biases)
            with torch.enable_grad():
                change = correction(z, *(one[place] for one in parts))
                loss = divergence_of_lens(final, unembedding.capped(plain + change)).sum()
                (loss / len(seen.final)).backward()


@torch.no_grad()
def held_out_losses(model: HeadModel, data: Data, lens: AttentionLens) -> FitReport:
    """Held-out loss of a lens and of the plain direct path."""
    found = Judge.of(tuple(f"L{layer}" for layer in lens.layers), data.held_out)
    unembedding, biases, done = model.unembedding, constants(model.unembedding), 0
    for batch in in_turn(data.held_out):
        seen = head_streams(model, batch, lens.layers)
        for chosen in row_chunks(len(seen.final), unembedding):
            final = logits_of(unembedding, seen.final[chosen]).log_softmax(1)
            for place, layer in enumerate(lens.layers):
                z = seen.z[layer][chosen]
                plain = layer_logits(model, layer, z, biases)
                parts = (one[place].to(z.device) for one in (lens.inner, lens.outer, lens.shift))
                change = correction(z, *parts)
                for which, logits in enumerate((plain + change, plain)):
                    example = seen.example[chosen] + done
                    found.add(which, place, final, unembedding.capped(logits), example)
        done += len(batch)
    return found.report(int(data.fit.real.sum()))
