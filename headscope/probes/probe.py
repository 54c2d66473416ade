"""``Probe``: a batch of token sequences with known structure, and the facts that scorers need."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.batches import PATCHES, PIXELS, TEXT, TOKENS, Batch
from headscope.base.files import Saved
from headscope.base.result import Glance, Shown, sizes
from headscope.base.stacks import PatchGrid
from headscope.errors import InputError


@dataclass(frozen=True, eq=False, repr=False)
class Probe(Saved, Shown):
    """Batch of token sequences with known structure; the model reads :attr:`batch`.

    Attributes:
        tokens: token ids; what stands at padding is never looked at. Of images, the number of each
            position.
        real: False at padding, which may be on either side but not inside.
        structure: equal labels mean "the same token by design"; -1 matches nothing. It is the
            tokens themselves but in a control, which keeps the labels and changes the tokens.
        targets: token that each position should predict; -1 where none is asked for.
        foils: wrong alternative to each target, for differences; None if there is none.
        marks: named sets of positions, e.g. ``needle``, ``subject_2``, ``end``.
        facts: named numbers, one per example, e.g. ``length``, ``depth``.
        name: kind of probe.
        seed: what it was drawn with; None if nothing was drawn.
        settings: the other facts that made it, for provenance (JSON values).
        control: the matched probe without the structure; None if there is none.
        corrupt: the paired probe whose answer differs, aligned position by position.
        clusters: a label per example; examples with the same label share a needle, a document
            or a template and count as one observation in errors, intervals and tests. None:
            every example stands for itself.
        pairs: named relations, whole numbers ``[pair 3]``: example, query and key of each pair;
            what :func:`headscope.scorers.relation` scores.
        next_token: whether the targets are the tokens that follow in the text itself, which a
            model that reads in both directions sees and is not asked for.
        inputs: what the model reads beside these tokens, by the name that its ``forward`` has for
            it, one row per example: of an encoder-decoder the source and its mask.
        source: for an encoder-decoder, what the encoder reads, with its own marks; the tokens are
            then those that the decoder reads.
        paired: for a control, whether its example i is example i of the probe without the
            structure, so that tests are of the difference; False: its examples are others.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    structure: Int[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos"]
    foils: Int[Tensor, "batch pos"] | None = None
    marks: Mapping[str, Bool[Tensor, "batch pos"]] = field(default_factory=dict)
    facts: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    name: str = "tokens"
    seed: int | None = None
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    control: "Probe | None" = None
    corrupt: "Probe | None" = None
    clusters: Int[Tensor, " batch"] | None = None
    paired: bool = False
    pairs: Mapping[str, Int[Tensor, "_ 3"]] = field(default_factory=dict)
    next_token: bool = False
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    source: "Probe | None" = None
    sequence: str = TEXT
    grid: PatchGrid | None = None

    def __post_init__(self) -> None:
        """Check shapes and padding; freeze the mappings."""
        if self.tokens.ndim != 2 or 0 in self.tokens.shape:
            raise InputError(
                "a probe is a batch of sequences [batch pos]; "
                f"got shape {tuple(self.tokens.shape)}."
            )
        facts = {"real": self.real, "structure": self.structure, "targets": self.targets}
        facts |= {} if self.foils is None else {"foils": self.foils}
        for name, value in (*facts.items(), *self.marks.items()):
            if value.shape != self.tokens.shape:
                raise InputError(
                    f"{name!r} has shape {tuple(value.shape)}, "
                    f"the tokens {tuple(self.tokens.shape)}."
                )
        for name, numbers in self.facts.items():
            if numbers.shape != self.tokens.shape[:1]:
                raise InputError(
                    f"{name!r} has {tuple(numbers.shape)} numbers for {len(self)} examples."
                )
        if self.clusters is not None and self.clusters.shape != self.tokens.shape[:1]:
            raise InputError(
                f"the clusters have {tuple(self.clusters.shape)} labels for {len(self)} examples."
            )
        if self.control is not None and self.control.paired and len(self.control) != len(self):
            raise InputError(
                f"a paired control has an example for each of the {len(self)} examples; "
                f"got {len(self.control)}."
            )
        steps = self.real.int().diff(dim=1)
        if (
            not self.real.any(1).all()
            or ((steps != 0).sum(1) > 2).any()
            or ((steps == -1).any(1) & (steps == 1).any(1) & (self.real[:, 0])).any()
        ):
            raise InputError("every example needs one unbroken run of real tokens.")
        for name, pairs in self.pairs.items():
            self._check_pairs(name, pairs)
        beside = {name: len(value) for name, value in self.inputs.items()}
        beside |= {} if self.source is None else {"the source": len(self.source)}
        for name, count in beside.items():
            if count != len(self):
                raise InputError(f"{name} has {count} examples, but the tokens have {len(self)}.")
        object.__setattr__(self, "inputs", MappingProxyType(dict(self.inputs)))
        object.__setattr__(self, "pairs", MappingProxyType(dict(self.pairs)))
        object.__setattr__(self, "marks", MappingProxyType(dict(self.marks)))
        object.__setattr__(self, "facts", MappingProxyType(dict(self.facts)))
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def _check_pairs(self, name: str, pairs: Tensor) -> None:
        if pairs.ndim != 2 or pairs.shape[1] != 3:
            raise InputError(f"the pairs {name!r} have shape {tuple(pairs.shape)}, not [pair 3].")
        if not len(pairs):
            return
        most = pairs.amax(0).tolist()
        if int(pairs.min()) < 0 or most[0] >= len(self) or max(most[1:]) >= self.length:
            raise InputError(
                f"the pairs {name!r} go up to example {most[0]}, query {most[1]}, key {most[2]}: "
                f"the probe has {len(self)} examples of {self.length} positions, counted from 0."
            )

    def __len__(self) -> int:
        """Number of examples."""
        return int(self.tokens.shape[0])

    @property
    def batch(self) -> Batch:
        """Input of the model, without the structure."""
        if self.sequence == PATCHES:
            return Batch(self.inputs, {PATCHES: self.real}, self.targets)
        beside = self.inputs if PIXELS in self.inputs else {}
        return Batch({TOKENS: self.tokens, **beside}, {TEXT: self.real}, self.targets)

    def on_grid(self, grid: PatchGrid | None) -> "Probe":
        """Cut images into patches as a model does; a probe already cut that way is returned as is.

        Args:
            grid: patch grid of the model that will read it; None: it reads no images.
        """
        if self.sequence != PATCHES or self.grid is not None or grid is None:
            return self
        return replace(
            self, **_cut(grid, len(self)), targets=at_first(self.targets[:, 0], grid.length)
        )

    @property
    def of_source(self) -> "Probe":
        """Probe of an encoder-decoder's source, with the decoder's input beside it.

        Raises:
            InputError: if the probe has no source.
        """
        if self.source is None:
            raise InputError(
                "this probe has no source for an encoder-decoder: use hs.probes.translation, or "
                "give hs.probes.from_batch input_ids and decoder_input_ids."
            )
        decoder = {"decoder_input_ids": self.tokens, "decoder_attention_mask": self.real.long()}
        features = {
            n: v for n, v in self.inputs.items() if n not in ("input_ids", "attention_mask")
        }
        return replace(self.source, inputs=features | decoder, clusters=self.clusters)

    @property
    def length(self) -> int:
        """Number of positions, padding included."""
        return int(self.tokens.shape[1])

    @property
    def cluster_labels(self) -> tuple[int, ...] | None:
        """Cluster of each example, as numbers; None if all examples are independent."""
        return None if self.clusters is None else tuple(int(one) for one in self.clusters.tolist())

    @cached_property
    def first(self) -> Int[Tensor, " batch"]:
        """First real position of each example."""
        return self.real.int().argmax(1)

    @cached_property
    def last(self) -> Int[Tensor, " batch"]:
        """Last real position of each example."""
        return self.length - 1 - self.real.flip(1).int().argmax(1)

    @property
    def answering(self) -> Bool[Tensor, "batch pos"]:
        """Positions at which a model makes a prediction: every real one, or an image's first."""
        if self.sequence != PATCHES:
            return self.real
        return self.real & (self.tokens == 0)

    @cached_property
    def position_in_text(self) -> Int[Tensor, "batch pos"]:
        """Position counted from the first real token; negative in left padding."""
        return torch.arange(self.length, device=self.tokens.device) - self.first[:, None]

    @cached_property
    def previous_occurrence(self) -> Int[Tensor, "batch pos"]:
        """Last earlier position with the same ``structure`` label; -1 if there is none.

        Following it repeatedly visits every earlier occurrence. Found by one stable sort, in memory
        linear in the length.
        """
        labels = self.structure.masked_fill(~self.real, -1)
        by_label = labels.argsort(dim=1, stable=True)
        ordered = labels.gather(1, by_label)
        same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        previous = torch.full_like(by_label, -1)
        previous[:, 1:] = by_label[:, :-1].where(same, previous[:, 1:])
        return torch.empty_like(previous).scatter_(1, by_label, previous)

    @cached_property
    def most_earlier(self) -> int:
        """Largest number of earlier occurrences of any position."""
        if self.host is not self:
            return self.host.most_earlier
        labels = self.structure.masked_fill(~self.real, -1).sort(dim=1).values
        rank = torch.arange(self.length, device=labels.device).expand_as(labels)
        new = torch.ones_like(self.real)
        new[:, 1:] = labels[:, 1:] != labels[:, :-1]
        run_start = rank.where(new, 0).cummax(dim=1).values
        return int((rank - run_start).where(labels >= 0, 0).max())

    @cached_property
    def host(self) -> "Probe":
        """The same probe on the CPU, where reading a size does not force a device sync."""
        return self if self.tokens.device.type == "cpu" else self.to("cpu")

    def glance(self) -> Glance:
        """Show kind, size, marks, and the lengths of the examples."""
        lengths = self.real.sum(1)
        short, long = int(lengths.min()), int(lengths.max())
        rows = [
            (f"mark {name}", f"{int(mark.sum())} positions") for name, mark in self.marks.items()
        ]
        asked = int((self.targets >= 0).sum())
        rows += [("targets", f"{asked} positions")] if asked else []
        rows += [
            (name, "a probe of the same size")
            for name in ("control", "corrupt")
            if getattr(self, name) is not None
        ]
        rows += (
            [("made with", ", ".join(f"{k}={v}" for k, v in self.settings.items()))]
            if self.settings
            else []
        )
        reach = f"{short} tokens" if short == long else f"{short} to {long} tokens"
        hint = "hs.score(model, probe), model.tokenizer.decode(probe.tokens[0])"
        if self.sequence == PATCHES:
            _, _, height, width = self.inputs[PIXELS].shape
            reach, hint = f"images of {width} x {height} pixels", "hs.score(model, probe)"
            reach += (
                "" if self.grid is None else f" in {self.grid.rows} x {self.grid.columns} patches"
            )
        return Glance(
            f"probe {self.name}",
            [
                sizes(("example",), (len(self),)),
                f"{reach} each" if self.sequence == TEXT else reach,
                "" if self.seed is None else f"seed {self.seed}",
            ],
            ("what", ""),
            rows,
            hint=hint,
        )

    def mark(self, name: str) -> Bool[Tensor, "batch pos"]:
        """Mask of the positions marked ``name``.

        Raises:
            InputError: if there is no such mark.
        """
        if name not in self.marks:
            known = ", ".join(sorted(self.marks)) or "none"
            raise InputError(f"this probe has no mark {name!r}; it has: {known}.")
        return self.marks[name]

    def related(self, name: str) -> Int[Tensor, "pair 3"]:
        """Pairs of the relation ``name``, as ``(example, query, key)``.

        Raises:
            InputError: if there is no such relation.
        """
        if name not in self.pairs:
            known = ", ".join(sorted(self.pairs)) or "none"
            raise InputError(f"this probe has no pairs {name!r}; it has: {known}.")
        return self.pairs[name]

    def to(self, device: torch.device | str) -> "Probe":
        """The same probe with its tensors on ``device``."""
        return self._unchecked(
            tokens=self.tokens.to(device),
            real=self.real.to(device),
            structure=self.structure.to(device),
            targets=self.targets.to(device),
            foils=None if self.foils is None else self.foils.to(device),
            marks=MappingProxyType({name: one.to(device) for name, one in self.marks.items()}),
            facts=MappingProxyType({name: one.to(device) for name, one in self.facts.items()}),
            control=None if self.control is None else self.control.to(device),
            corrupt=None if self.corrupt is None else self.corrupt.to(device),
            clusters=None if self.clusters is None else self.clusters.to(device),
            pairs={name: pairs.to(device) for name, pairs in self.pairs.items()},
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            source=None if self.source is None else self.source.to(device),
        )

    def _unchecked(self, **changes: Any) -> "Probe":
        """Copy the fields without checking them again, which would force a device sync."""
        made = object.__new__(Probe)
        for one in fields(self):
            object.__setattr__(made, one.name, changes.get(one.name, getattr(self, one.name)))
        if self.tokens.device.type == "cpu" != made.tokens.device.type:
            made.__dict__["host"] = self
        return made

    def examples(self, chosen: slice | Int[Tensor, " some"]) -> "Probe":
        """Select some examples, in the order given."""
        numbers = torch.arange(len(self))[chosen]
        return replace(
            self,
            tokens=self.tokens[chosen],
            real=self.real[chosen],
            structure=self.structure[chosen],
            targets=self.targets[chosen],
            foils=None if self.foils is None else self.foils[chosen],
            marks={name: mark[chosen] for name, mark in self.marks.items()},
            facts={name: numbers[chosen] for name, numbers in self.facts.items()},
            control=None if self.control is None else self.control.examples(chosen),
            corrupt=None if self.corrupt is None else self.corrupt.examples(chosen),
            clusters=None if self.clusters is None else self.clusters[chosen],
            pairs={name: pairs_of_examples(pairs, numbers) for name, pairs in self.pairs.items()},
            inputs={name: value[chosen] for name, value in self.inputs.items()},
            source=None if self.source is None else self.source.examples(chosen),
        )


def of_images(
    pixels: Float[Tensor, "batch channel height width"],
    grid: PatchGrid | None,
    classes: Int[Tensor, " batch"] | None = None,
    **facts: Any,
) -> Probe:
    """Make a probe of images, with marks for the kinds of positions.

    Args:
        pixels: as the model reads them.
        grid: patch grid of the model; None: not known yet.
        classes: target of each image at the first position; -1 or None: none.
        facts: other fields of the probe; ``marks`` are added to.
    """
    asked = torch.full((len(pixels),), -1) if classes is None else classes.long()
    whole = torch.zeros(len(pixels), 1, dtype=torch.long)
    marks = dict(facts.pop("marks", {}))
    cut: dict[str, Any] = (
        {"tokens": whole, "real": whole == 0, "structure": whole}
        if grid is None
        else _cut(grid, len(pixels))
    )
    return Probe(
        **{**cut, "marks": {**cut.get("marks", {}), **marks}},
        targets=at_first(asked, 1 if grid is None else grid.length),
        inputs={PIXELS: pixels},
        sequence=PATCHES,
        **{"name": "images", **facts},
    )


def _cut(grid: PatchGrid, batch: int) -> dict[str, Any]:
    """Fields that follow from an image's grid: positions, which are all real, and their kinds."""
    tokens = torch.arange(grid.length).repeat(batch, 1)
    real = torch.ones_like(tokens, dtype=torch.bool)
    known = {"tokens": tokens, "real": real, "structure": tokens, "marks": grid.marks(batch)}
    return {**known, "grid": grid}


def at_first(classes: Int[Tensor, " batch"], length: int) -> Int[Tensor, "batch pos"]:
    """Place classes as targets at the first position, where a whole image is classified."""
    targets = torch.full((len(classes), length), -1, device=classes.device)
    targets[:, 0] = classes
    return targets


def pairs_of_examples(
    pairs: Int[Tensor, "pair 3"], numbers: Int[Tensor, " some"]
) -> Int[Tensor, "kept 3"]:
    """Pairs of some examples, renumbered."""
    parts = [pairs[:0]]
    for new, old in enumerate(numbers.tolist()):
        part = pairs[pairs[:, 0] == old].clone()
        part[:, 0] = new
        parts.append(part)
    return torch.cat(parts)


def probe_digest(*probes: Probe | None) -> str:
    """SHA-256 of everything in some probes that edits and metrics may read."""
    digest = hashlib.sha256()
    for probe in probes:
        if probe is None:
            digest.update(b"none")
            continue
        tensors = {"tokens": probe.tokens, "real": probe.real, "targets": probe.targets}
        tensors |= {} if probe.foils is None else {"foils": probe.foils}
        tensors |= {f"mark {name}": mark for name, mark in sorted(probe.marks.items())}
        tensors |= {f"input {name}": value for name, value in sorted(probe.inputs.items())}
        for name, value in tensors.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        digest.update(probe_digest(probe.corrupt).encode() if probe.corrupt is not None else b"-")
    return digest.hexdigest()
