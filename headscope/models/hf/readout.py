"""How a transformers model reads its last residual stream, measured from its own final norm."""

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import curve_fit
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.models.loading.agreement import gap
from headscope.models.offload import at_hand, parameter, runs_on
from headscope.views.outputs import Readout
from headscope.views.qk import InputNorm


@dataclass(frozen=True)
class LogitMap:
    """What a model does to the outputs ``u`` of its unembedding, all of them alike.

    ``logits = scale * u``, or ``cap * tanh(scale * u / cap)`` where there is a soft cap.
    """

    scale: float
    soft_cap: float | None

    def __call__(self, u: Tensor) -> Tensor:
        """Logits in fp64."""
        scaled = u.double() * self.scale
        return scaled if self.soft_cap is None else self.soft_cap * (scaled / self.soft_cap).tanh()


# Outputs of the unembedding that are sent to the logits: from where a cap does nothing to where
# it does everything.
_SMALLEST, _LARGEST = 1e-3, 300.0


def ramp(output: Tensor) -> Tensor:
    """Numbers of both signs and all sizes, in the shape of an unembedding's outputs."""
    count = output.numel()
    sizes = torch.logspace(math.log10(_SMALLEST), math.log10(_LARGEST), count, dtype=torch.float64)
    signs = 1.0 - 2.0 * (torch.arange(count) % 2)
    return (sizes * signs).reshape(output.shape).to(output)


def measure_logit_map(u: Tensor, logits: Tensor) -> LogitMap | None:
    """Find scale and soft cap that take outputs of an unembedding to logits; None if none do.

    Args:
        u: outputs that span many sizes, see :func:`ramp`.
        logits: what the model made of them.
    """
    if u.shape != logits.shape:
        return None
    given, made = (one.detach().flatten().cpu().double() for one in (u, logits))
    near = given.abs() < 100 * _SMALLEST
    scale = float((given * made)[near].sum() / given[near].square().sum())
    allowed = 8 * torch.finfo(logits.dtype).eps + 8 * torch.finfo(u.dtype).eps
    linear = LogitMap(_short(float((given * made).sum() / given.square().sum())), None)
    if gap(linear(given), made, allowed).closed:
        return linear
    bound = float(made.abs().max())
    if not 0 < scale < math.inf or not 0 < bound < math.inf:
        return None
    found, _ = curve_fit(
        lambda x, s, c: c * np.tanh(s * x / c), given.numpy(), made.numpy(), p0=(scale, bound)
    )
    capped = LogitMap(_short(float(found[0])), _short(float(found[1])))
    return capped if gap(capped(given), made, allowed).closed else None


def _short(value: float) -> float:
    """The number with few digits that a config would hold, where it is as good."""
    rounded = float(f"{value:.4g}")
    return rounded if abs(rounded - value) <= 1e-5 * abs(value) else value


def find_readout(model: Any, final_norm: nn.Module, d_model: int, logit_map: LogitMap) -> Readout:
    """Measure the final norm, and join it to the unembedding and what follows it.

    Raises:
        UnsupportedModelError: if the module does not act like LayerNorm or RMSNorm.
    """
    return measure_readout(
        model.get_output_embeddings(),
        final_norm,
        d_model,
        logit_scale=logit_map.scale,
        soft_cap=logit_map.soft_cap,
    )


def measure_readout(
    head: Any, final_norm: nn.Module, d_model: int, *, logit_scale: float, soft_cap: float | None
) -> Readout:
    """Measure a norm that is followed by an unembedding.

    Raises:
        UnsupportedModelError: if the module does not act like LayerNorm or RMSNorm.
    """
    norm = measure_norm(final_norm, d_model, runs_on(head, head.weight))
    return Readout(
        W_U=parameter(head, "weight"),
        b_U=None if getattr(head, "bias", None) is None else parameter(head, "bias"),
        gain=norm.gain,
        bias=norm.bias,
        centred=norm.centred,
        epsilon=norm.epsilon,
        logit_scale=logit_scale,
        soft_cap=soft_cap,
    )


def measure_norm(module: Any, d_model: int, device: torch.device) -> InputNorm:
    """Measure gain, bias, centring and epsilon of a norm.

    The norm is applied to a known vector and its negative: half the difference is the gain
    times the normalised vector, half the sum is the bias. So ``weight``, ``1 + weight`` and
    whatever comes next are the same to us.

    Raises:
        UnsupportedModelError: if the module does not act like LayerNorm or RMSNorm.
    """
    with at_hand(module):
        norm = copy.deepcopy(unhooked(module)).float().eval()  # a few thousand numbers; exact
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 2, d_model, generator=generator, dtype=torch.float32) + 0.5
    given = probe.to(device)
    with torch.no_grad():  # fetched together: the host waits for the device once
        there, back, moved = torch.stack([norm(given), norm(-given), norm(given + 3.0)]).cpu()
    centred = gap(moved, there, 1e-3).closed
    epsilon = named_epsilon(module)
    if epsilon is None:
        epsilon = _measured_epsilon(norm, given, centred)
    x = probe.float()
    x = x - x.mean(-1, keepdim=True) if centred else x
    unit = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    bias = (there + back)[0, 0] / 2
    odd = (there - back) / 2
    gain = (odd * unit).sum((0, 1)) / unit.square().sum((0, 1))
    if not gap(gain * unit, odd, 1e-3).closed:
        raise UnsupportedModelError("one of its norms is neither LayerNorm nor RMSNorm.")
    bias = torch.zeros_like(bias) if float(bias.abs().max()) < 1e-6 else bias
    return InputNorm(gain.to(device), bias.to(device), centred, epsilon)


def unhooked(module: Any) -> Any:
    """The module with the same weights and no hooks: those of a running pass cannot be copied."""
    bare = copy.copy(module)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    bare.__dict__.pop("forward", None)  # accelerate's, which would unload it again
    bare.__dict__.pop("_hf_hook", None)
    return bare


def named_epsilon(norm: nn.Module) -> float | None:
    """What a norm adds under its root, by the names that families give it; None if it has none."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    return None


@torch.no_grad()
def _measured_epsilon(norm: nn.Module, probe: Tensor, centred: bool) -> float:
    """From how much less than its share a small vector comes out (olmo names no epsilon).

    With ``m`` the mean square of x and ``r`` the size of ``norm(t x)`` over that of ``norm(x)``,
    ``r^2 (t^2 m + epsilon) = t^2 (m + epsilon)``.
    """
    x = probe - probe.mean(-1, keepdim=True) if centred else probe
    square, t = float(x.square().mean()), 1e-3
    x = x * (square / x.square().mean(-1, keepdim=True)).sqrt()  # all rows alike
    small, large = (((norm(s * x) - norm(-s * x)) / 2).cpu().double() for s in (t, 1.0))
    r2 = float((small * large).sum() / large.square().sum()) ** 2
    return max(0.0, t**2 * square * (1 - r2) / max(r2 - t**2, 1e-12))


def logit_scale(config: Any) -> float:
    """Multiplier of the logits: cohere multiplies, granite divides."""
    multiplier = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return float(multiplier or 1.0) / float(divisor or 1.0)
