"""``hs.testing.check_model`` for encoder-decoders: every stack against the model itself."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from headscope import metrics, probes
from headscope.ablation import ablate_heads
from headscope.capture import CapturedLayer, collect
from headscope.edits import zero
from headscope.errors import HeadscopeError
from headscope.heads import HeadIndex
from headscope.models.hf.seq2seq import Seq2SeqModel
from headscope.models.hf.transformers_api import attention_name
from headscope.models.loading import load
from headscope.models.running import answer
from headscope.models.taps import Tap, TapView, writes_of
from headscope.probes.probe import Probe
from headscope.scoring import score
from headscope.testing.plain import PlainModel, PlainRun
from headscope.testing.report import CheckError, CheckReport, agree, ensure, run_checks

_SOURCE, _TARGET = 23, 17
_TOLERANCE = {torch.float32: 2.5e-4, torch.float64: 2.5e-4}
_HALF_TOLERANCE = 0.1


def check_stacks(model: Seq2SeqModel, *, raises: bool, seed: int) -> CheckReport:
    """Check every stack of an encoder-decoder against the model with eager attention.

    Args:
        model: model from :func:`headscope.load`.
        raises: raise at the first failure.
        seed: seed for sources and targets.
    """
    return run_checks(model.name, _Subject(model, seed), _CHECKS, raises=raises)


@dataclass(eq=False)
class _Subject:
    """An encoder-decoder, run plainly and through headscope."""

    model: Any
    seed: int
    plain: PlainModel = field(init=False)

    def __post_init__(self) -> None:
        """Prepare the plain model."""
        self.plain = PlainModel(self.model.module)
        self.tolerance = _TOLERANCE.get(self.model.dtype, _HALF_TOLERANCE)

    @cached_property
    def probe(self) -> Probe:
        """Random sources and targets of different lengths."""
        limits = (self.model.stack(one).shape.n_ctx for one in ("encoder", "decoder"))
        source, target = (
            min(length, limit or length)
            for length, limit in zip((_SOURCE, _TARGET), limits, strict=True)
        )
        whole = probes.copied_tokens(self.model, source, batch=2, seed=self.seed)
        assert whole.source is not None  # noqa: S101  # a copied token has a source
        target = target if target != whole.source.length else target - 1
        return replace(
            whole,
            tokens=whole.tokens[:, :target],
            real=whole.real[:, :target],
            structure=whole.structure[:, :target],
            targets=whole.targets[:, :target],
        )

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model for the probe."""
        own = {"decoder_input_ids": self.probe.tokens, "use_cache": False, **self.probe.inputs}
        place = self.model.device
        return {n: v.to(place) if isinstance(v, Tensor) else v for n, v in own.items()}

    @cached_property
    def clean(self) -> PlainRun:
        """The plain pass."""
        return self.plain.run_on(self.inputs)

    @cached_property
    def numbers(self) -> dict[str, list[int]]:
        """Indices of the attention calls of each stack, identified by their lengths."""
        target = self.probe.length
        found: dict[str, list[int]] = {"encoder": [], "decoder": [], "cross": []}
        for number, call in enumerate(self.clean.calls):
            queries, keys = call.query.shape[2], call.key.shape[2]
            crossed = "decoder" if keys == target else "cross"
            found["encoder" if queries != target else crossed].append(number)
        return found

    @cached_property
    def seen(self) -> dict[str, dict[int, CapturedLayer]]:
        """Rows and head outputs from headscope, by stack and layer."""
        return {name: collect(self.model, self.probe, stack=name) for name in self.model.stacks}

    def calls(self, name: str) -> Iterator[tuple[int, int]]:
        """Layers of a stack, with the indices of their calls."""
        layers = self.model.stack(name).shape.attention_layers
        return zip(layers, self.numbers[name], strict=True)

    def heads(self, name: str) -> list[tuple[HeadIndex, int]]:
        """One head of the first and one of the last layer, with the indices of their calls."""
        calls = list(self.calls(name))
        last = self.model.stacks[name].n_heads - 1
        chosen = [(*calls[0], 0), (*calls[-1], last)]
        return [(HeadIndex(layer, head, name), number) for layer, number, head in chosen]

    def without(self, number: int, head: int) -> Tensor:
        """Logits of the plain pass with one head's output at 0."""
        return self.plain.run_on(self.inputs, zeroed={number: [head]}).logits


def _shape(subject: _Subject) -> None:
    """Layers, heads and sizes are those of the attention calls."""
    for name, stack in subject.model.stacks.items():
        ensure(len(subject.numbers[name]) > 0, f"the model runs no {name} attention.")
        ensure(
            len(subject.numbers[name]) == stack.n_layers,
            f"the {name} has {stack.n_layers} layers, the model runs {len(subject.numbers[name])}.",
        )
        for layer, number in subject.calls(name):
            call = subject.clean.calls[number]
            ensure(
                (call.query.shape[1], call.value.shape[3]) == (stack.n_heads, stack.d_head),
                f"heads of layer {layer} of the {name} are {call.query.shape[1]} of "
                f"{call.value.shape[3]}, not {stack.n_heads} of {stack.d_head}.",
            )


@torch.no_grad()
def _logits(subject: _Subject) -> None:
    """Logits match the model's own, with and without readers, from any stack."""
    own = answer(subject.model.module(**subject.inputs)).float()
    agree(subject.clean.logits, own, subject.tolerance, "logits of its own eager attention")
    for name in subject.model.stacks:
        view = subject.model.stack(name)
        reads = {Tap("z", layer): _nothing for layer in view.shape.attention_layers}
        logits = view.answer(subject.probe, reads=reads)
        agree(logits, own, subject.tolerance, f"logits by {name}")


def _nothing(_view: TapView) -> None:
    """Read a tap and keep nothing."""


def _rows(subject: _Subject) -> None:
    """Rows match plain eager attention."""
    for name in subject.model.stacks:
        for layer, number in subject.calls(name):
            own = subject.clean.calls[number].pattern.float()
            rows = subject.seen[name][layer].pattern
            agree(rows, own.cpu(), subject.tolerance, f"rows of layer {layer} of the {name}")


def _outputs(subject: _Subject) -> None:
    """``z`` of every layer matches plain eager attention."""
    for name in subject.model.stacks:
        for layer, number in subject.calls(name):
            own, z = subject.clean.calls[number].z.float(), subject.seen[name][layer].z
            agree(z, own.cpu(), subject.tolerance, f"head outputs of layer {layer} of the {name}")


@torch.no_grad()
def _zero_ablation(subject: _Subject) -> None:
    """Zeroing one head's output has the same effect in a pass and by ``hs.ablate_heads``."""
    asked = subject.probe.targets >= 0
    for name in subject.model.stacks:
        view = subject.model.stack(name)
        for head, number in subject.heads(name):
            expected = subject.without(number, head.head)
            edited = view.answer(subject.probe, writes=writes_of((zero(head),)))
            agree(edited, expected.float(), subject.tolerance, f"logits without {head}")
            if "logits" in view.limits:
                continue
            effect = ablate_heads(
                subject.model, subject.probe, metrics.loss, "zero", heads=[head], progress=False
            )
            change = _loss(expected, subject, asked) - _loss(subject.clean.logits, subject, asked)
            scale = subject.clean.logits.abs().max().clamp_min(1.0).double().cpu()
            agree(
                torch.tensor(effect[head]) / scale,
                change / scale,
                subject.tolerance,
                f"changes of the loss by ablating {head}",
            )


def _loss(logits: Tensor, subject: _Subject, asked: Tensor) -> Tensor:
    rows = logits.cpu()[asked].double()
    return nn.functional.cross_entropy(rows, subject.probe.targets[asked])


def _one_stack(subject: _Subject) -> None:
    """Ablating a cross or decoder head does not change the encoder's rows."""
    encoder = subject.model.stack("encoder")
    before = subject.seen["encoder"]
    for name in ("decoder", "cross"):
        head, number = subject.heads(name)[0]
        run = subject.plain.run_on(subject.inputs, zeroed={number: [head.head]})
        for layer, call in subject.calls("encoder"):
            own = run.calls[call].pattern.float().cpu()
            agree(own, before[layer].pattern, subject.tolerance, f"encoder rows without {head}")
    ensure(encoder.stacks["encoder"].queries == "source", "the encoder does not run on the source.")


@torch.no_grad()
def _padding(subject: _Subject) -> None:
    """Right padding of source and target changes nothing."""
    probe, extra = subject.probe, 3
    real = torch.ones(len(probe), extra, dtype=torch.bool) & False
    tokens = torch.cat([probe.tokens, probe.tokens[:, :extra]], 1)
    inputs = dict(probe.inputs)
    if "input_ids" in inputs:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        inputs["input_ids"] = torch.cat([ids, ids[:, :extra]], 1)
        inputs["attention_mask"] = torch.cat([mask, real.long()], 1)
    gone = torch.full_like(tokens, -1)
    wide = replace(
        probe,
        tokens=tokens,
        real=torch.cat([probe.real, real], 1),
        structure=gone,
        targets=gone,
        inputs=inputs,
        source=None,
    )
    limit = subject.model.stack("decoder").shape.n_ctx
    if limit is not None and wide.length > limit:
        wide = probe
    logits = subject.model.stack("decoder").answer(wide)
    ensure(logits is not None, "a whole pass gives no logits.")
    assert logits is not None  # noqa: S101  for the type checker
    own = subject.clean.logits.float()
    agree(logits[:, : probe.length], own, subject.tolerance, "logits with right padding of both")


def _batch_size(subject: _Subject) -> None:
    """Scores of one example at a time match those of a batch."""
    one = score(subject.model, subject.probe, ["entropy"], batch_size=1, progress=False)
    both = score(subject.model, subject.probe, ["entropy"], batch_size=2, progress=False)
    for name in one:
        agree(
            torch.tensor(one[name].mean),
            torch.tensor(both[name].mean),
            subject.tolerance,
            f"{name} of one example at a time",
        )


def _scores(subject: _Subject) -> None:
    """Entropy as computed from whole patterns, over every query but the first."""
    table = score(subject.model, subject.probe, ["entropy"], progress=False)
    for name in subject.model.stacks:
        found = table.stack(name)["entropy"].mean
        for layer, number in subject.calls(name):
            rows = subject.clean.calls[number].pattern.double().cpu()
            expected = -torch.special.xlogy(rows, rows).sum(-1)[:, :, 1:].mean((0, 2))
            agree(torch.tensor(found[layer]), expected, subject.tolerance, f"entropy of the {name}")


def _restored(subject: _Subject) -> None:
    """A pass leaves training mode, hooks and attention implementation as they were."""
    module = subject.model.module
    module.train()
    try:
        before = _state(subject)
        subject.model.stack("cross").answer(subject.probe)
        ensure(_state(subject) == before, "a pass leaves the model changed.")
        try:
            subject.model.stack("cross").run(
                subject.probe, reads={Tap("z", 0): lambda view: 1 // 0}
            )
        except ZeroDivisionError:
            pass
        else:
            raise CheckError("a reader that fails goes unnoticed.")
        ensure(_state(subject) == before, "a pass that fails leaves the model changed.")
    finally:
        module.eval()


def _state(subject: _Subject) -> Any:
    parts = list(subject.model.module.named_modules())
    return (
        [(n, p.training, len(p._forward_hooks), len(p._forward_pre_hooks)) for n, p in parts],
        [attention_name(config) for config in subject.plain.configs],
    )


def _not_a_number(subject: _Subject) -> None:
    """A model with NaN weights is refused."""
    view = subject.model.stack("cross")
    layer = view.shape.attention_layers[-1]
    refuse_nan(subject.model.module, view.layout.layers[layer].projection)


def refuse_nan(module: nn.Module, part: nn.Module) -> None:
    """Check that a copy of a model is refused if the weights of one part are NaN."""
    broken = copy.deepcopy(module)
    name = next(name for name, one in module.named_modules() if one is part)
    weight: Any = broken.get_submodule(name).weight
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        load(broken)
    except HeadscopeError:
        return
    raise CheckError("NaN weights are accepted.")


_CHECKS: tuple[tuple[str, Callable[[_Subject], None]], ...] = (
    ("shape", _shape),
    ("logits", _logits),
    ("rows", _rows),
    ("head outputs", _outputs),
    ("zero ablation", _zero_ablation),
    ("encoder apart", _one_stack),
    ("padding right", _padding),
    ("batch size", _batch_size),
    ("scores", _scores),
    ("restored", _restored),
    ("not a number", _not_a_number),
)
