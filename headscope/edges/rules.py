"""Backward rules that replace the gradients of norms, activations, gates and softmax.

A forward pass in one of these scopes computes the same values; only gradients differ. Calls of
torch functions are intercepted, so no model-specific code is needed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions f(x) treated as a factor f(x) / x, and functions that are already a factor.
_ACTIVATIONS = ("gelu", "silu", "relu", "mish", "elu", "leaky_relu")
_FACTORS = ("sigmoid", "tanh")
_PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")
TEMPERATURE = 2.0
# Query times key and pattern times value: each product splits its gradient between its factors.
GIM_SHARES: Mapping[str, float] = {"query": 0.25, "key": 0.25, "value": 0.5}


class Rules(TorchFunctionMode):
    """Scope in which norms divide by a constant; subclasses replace more gradients.

    Attributes:
        in_mlp: whether the pass is between attention and the end of the MLP; set by readers of the
            pass.
    """

    def __init__(self) -> None:
        """Start before the first block."""
        super().__init__()
        self.in_mlp = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace functions that have a rule; pass others through."""
        rule = self.rule(getattr(func, "__name__", ""))
        if rule is not None and torch.is_grad_enabled():
            return rule(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def rule(self, name: str) -> Callable[..., Any] | None:
        """Replacement of a torch function; None: the function itself."""
        if name == "layer_norm":
            return _layer_norm
        if name == "rms_norm":
            return _rms_norm
        return _constant if name in ("rsqrt", "sqrt") else None


class RelevanceRules(Rules):
    """Layer-wise relevance propagation: LN-rule, identity rule and half rule.

    Norms divide by a constant, activations are their input times a constant, and gates split their
    gradient with the gated value. Attention keeps its gradient, as in the released code, so queries
    and keys have a score.

    Source:
        Jafari et al. 2025, arXiv 2508.21258.
    """

    def rule(self, name: str) -> Callable[..., Any] | None:
        """Rules for norms everywhere, and for activations and gates inside MLPs."""
        if self.in_mlp:
            if name in _ACTIVATIONS:
                return _identity
            if name in _FACTORS:
                return _constant
            if name in _PRODUCTS:
                return _half
        return super().rule(name)


class InteractionRules(Rules):
    """Gradient interaction modifications: frozen norms, and a softmax with a softened gradient.

    The gradient of a softmax is taken at twice the temperature. The gradient shares of queries,
    keys and values are :data:`GIM_SHARES`, applied by the readers of these taps.

    This is the paper's version. Newer releases of its code also halve the gradients at the gate and
    the gated value in gated MLPs; here MLPs keep their gradients.

    Source:
        Edin et al. 2025, arXiv 2505.17630.
    """

    def rule(self, name: str) -> Callable[..., Any] | None:
        """Rules for norms everywhere, and for the softmax in attention."""
        if not self.in_mlp:
            if name == "softmax":
                return _softmax
            if name == "scaled_dot_product_attention":
                return _attention
        return super().rule(name)


def with_share(share: float) -> Callable[[Tensor], Tensor]:
    """Identity function that passes on a share of the gradient."""
    return lambda value: value * share + (value * (1 - share)).detach()


def _constant(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs).detach()


def _layer_norm(
    func: Any,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    over = tuple(range(-len(shape), 0))
    centred = x - x.mean(over, keepdim=True)
    scale = (centred.square().mean(over, keepdim=True) + eps).rsqrt().detach()
    return _affine(func(x, shape, weight, bias, eps), centred * scale, weight, bias)


def _rms_norm(
    func: Any, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    over = tuple(range(-len(shape), 0))
    small = torch.finfo(x.dtype).eps if eps is None else eps
    scale = (x.square().mean(over, keepdim=True) + small).rsqrt().detach()
    return _affine(func(x, shape, weight, eps), x * scale, weight, None)


def _affine(value: Tensor, normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Output of a norm, with the gradient for a constant scale."""
    made = normed if weight is None else normed * weight
    made = made if bias is None else made + bias
    return value.detach() + made - made.detach()


def _identity(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        value: Tensor = func(x.clone(), *args, **kwargs)
        slope = torch.where(x == 0, torch.full_like(x, 0.5), value / x)
    return value + (x * slope) - (x * slope).detach()


def _half(func: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    """Product that splits its gradient if both factors are activations of the same shape."""
    inner = [isinstance(one, Tensor) and one.requires_grad and not one.is_leaf for one in (a, b)]
    product = func(a, b, *args, **kwargs)
    if not all(inner) or a.shape != b.shape:
        return product
    return with_share(0.5)(product)


class _SoftGradient(torch.autograd.Function):
    """Softmax over the last axis with the gradient of a higher temperature."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(torch.softmax(scores / TEMPERATURE, -1))
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (soft,), slope = ctx.saved_tensors, slopes[0]
        made: Tensor = soft * (slope - (slope * soft).sum(-1, keepdim=True))
        return made


# torch declares no types for it.
_softened: Callable[[Tensor], Tensor] = _SoftGradient.apply


def _softmax(func: Any, x: Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    if not x.requires_grad or dim not in (-1, x.ndim - 1):
        return func(x, dim, *args, **kwargs)
    value = func(x, dim, *args, **kwargs)
    soft = _softened(x)
    return value.detach() + (soft - soft.detach()).to(value.dtype)


def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Explicit attention with the softened softmax gradient."""
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (one.repeat_interleave(group, -3) for one in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _softened(scores).nan_to_num(0.0) @ value
