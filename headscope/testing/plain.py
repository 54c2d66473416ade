"""Reference runs of a transformers model: its own eager attention and plain torch hooks.

Nothing here shares code with headscope's own way to run models, so the two can be compared.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.models.hf.transformers_api import attention_name, names_attention, set_attention_name
from headscope.models.running import answer
from headscope.testing.report import relative_gap

_NAME = "headscope_plain"
_OWN = (
    "eager_attention_forward"  # name of the eager attention function in transformers' model files
)
_RUN: ContextVar["PlainRun | None"] = ContextVar("headscope_plain_run", default=None)


@dataclass(frozen=True, eq=False)
class PlainCall:
    """One layer's attention, computed by the model's own eager function.

    Attributes:
        module: the attention module that called it.
        z: attention-weighted values.
    """

    module: nn.Module
    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    value: Float[Tensor, "batch kv_head key d_value"]
    pattern: Float[Tensor, "batch head query key"]
    z: Float[Tensor, "batch query head d_value"]


@dataclass(eq=False)
class PlainRun:
    """One plain pass.

    Attributes:
        zeroed: heads whose output is set to 0, by index of the attention call.
        calls: attention calls in order; empty if a family has no separate attention function.
        patterns: attention probabilities of every attention layer, in order.
        logits: logits at every position.
    """

    zeroed: Mapping[int, list[int]] = field(default_factory=dict)
    calls: list[PlainCall] = field(default_factory=list)
    patterns: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def name_of(given: Tensor) -> str:
    """Name of a model's input argument, for token ids or images."""
    return "pixel_values" if given.ndim == 4 else "input_ids"


def by_position(said: Tensor) -> Float[Tensor, "batch pos width"]:
    """Model output by position; for an image classifier, a single position."""
    return said[:, None] if said.ndim == 2 else said


class PlainModel:
    """A transformers model on its own eager attention.

    Args:
        module: model; its state is restored after every pass.
    """

    def __init__(self, module: Any) -> None:
        _register()
        self.module = module
        configs: list[Any] = [getattr(part, "config", None) for part in module.modules()]
        with_attention = {id(c): c for c in configs if names_attention(c)}
        self.configs: tuple[Any, ...] = tuple(with_attention.values())
        self.accepts = frozenset(signature(module.forward).parameters)

    @torch.no_grad()
    def run(
        self,
        tokens: Int[Tensor, "batch pos"] | Float[Tensor, "batch channel height width"],
        real: Bool[Tensor, "batch pos"] | None = None,
        *,
        zeroed: Mapping[int, list[int]] | None = None,
        hooks: Mapping[nn.Module, Callable[..., Any]] | None = None,
    ) -> PlainRun:
        """Run the model once.

        Args:
            tokens: token ids, or images.
            real: False at padding; None means no padding.
            zeroed: heads whose output is set to 0, by index of the attention call.
            hooks: forward pre-hooks (called with keyword arguments) for the duration of the pass.
        """
        inputs: dict[str, Any] = {name_of(tokens): tokens}
        if "use_cache" in self.accepts:
            inputs["use_cache"] = False
        if real is not None:
            inputs["attention_mask"] = real.long()
            if "position_ids" in self.accepts:
                inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
        return self.run_on(inputs, zeroed=zeroed, hooks=hooks)

    @torch.no_grad()
    def run_on(
        self,
        inputs: Mapping[str, Any],
        *,
        zeroed: Mapping[int, list[int]] | None = None,
        hooks: Mapping[nn.Module, Callable[..., Any]] | None = None,
    ) -> PlainRun:
        """Run the model once on named inputs; see :meth:`run` for the other arguments."""
        run = PlainRun(zeroed or {})
        with ExitStack() as stack:
            for module, hook in (hooks or {}).items():
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(self._attention(_NAME, run))
            run.logits = by_position(answer(self.module(**inputs)))
        run.patterns = [call.pattern for call in run.calls]
        if not run.calls:
            run.patterns = self._shown(inputs, hooks or {})
        return run

    def _shown(
        self, inputs: Mapping[str, Any], hooks: Mapping[nn.Module, Callable[..., Any]]
    ) -> list[Tensor]:
        """Patterns returned by the model itself, if it has no separate attention function."""
        with ExitStack() as stack:
            for module, hook in hooks.items():
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(self._attention("eager", None))
            output = self.module(**inputs, output_attentions=True)
        return [p for p in output.attentions or () if isinstance(p, Tensor)]

    @contextmanager
    def _attention(self, name: str, run: PlainRun | None) -> Iterator[None]:
        before = [attention_name(config) for config in self.configs]
        token = _RUN.set(run)
        try:
            for config in self.configs:
                set_attention_name(config, name)
            yield
        finally:
            _RUN.reset(token)
            for config, own in zip(self.configs, before, strict=True):
                set_attention_name(config, own)


def _register() -> None:
    """Register plain attention in transformers' registry, with eager masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call the model's own eager function and record it; see transformers' AttentionInterface."""
    own = getattr(sys.modules[type(module).__module__], _OWN, None)
    if own is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no eager attention to compare with."
        )
    output, pattern = own(module, query, key, value, attention_mask, **kwargs)
    run = _RUN.get()
    if run is None:
        return output, pattern
    if heads := run.zeroed.get(len(run.calls)):
        output = output.clone()
        output[:, :, heads] = 0
    rows = pattern if heads else _rows(pattern, value, output)
    run.calls.append(PlainCall(module, query, key, value, rows, output.clone()))
    return output, pattern


def _rows(
    pattern: Float[Tensor, "batch head query key"],
    value: Float[Tensor, "batch kv_head key d_value"],
    z: Float[Tensor, "batch query head d_value"],
) -> Float[Tensor, "batch head query key"]:
    """Rows that were effectively applied to the values.

    Some families return only the softmax and scale each row's average by the share that a learned
    sink leaves (granite_swa): one factor per row, recovered from ``z``.
    """
    repeated = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
    average = (pattern.float() @ repeated.float()).transpose(1, 2)
    given = z.float()
    factor = (average * given).sum(-1) / average.square().sum(-1).clamp_min(1e-30)
    explained = relative_gap(factor[..., None] * average, given) < 1e-4
    alone = relative_gap(average, given) < 1e-4
    if alone or not explained:
        return pattern
    return pattern * factor.transpose(1, 2)[..., None].to(pattern.dtype)


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Scope with a forward hook of torch on some modules."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


class Sites:
    """Inputs and outputs of every module in one pass, where these are tensors.

    Attributes:
        inputs, outputs: first input tensor and first output tensor of each module.
    """

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Record every submodule of a module."""
        with ExitStack() as stack:
            for part in module.modules():
                stack.callback(part.register_forward_hook(self._note, with_kwargs=True).remove)
            yield

    def _note(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        made = output[0] if isinstance(output, tuple) else output
        if isinstance(given, Tensor) and given.is_floating_point():
            self.inputs[module] = given.detach().clone()
        if isinstance(made, Tensor):
            self.outputs[module] = made.detach().clone()


def flat_heads(z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos width"]:
    """Concatenated head outputs, as read by an output projection."""
    return rearrange(z, "batch pos head d_head -> batch pos (head d_head)")
