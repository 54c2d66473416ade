"""Scorers of head outputs and of the gradient of a metric by them."""

from jaxtyping import Float
from torch import Tensor

from headscope import metrics
from headscope.probes.probe import Probe
from headscope.scorer import gradient_scorer
from headscope.scorers.queries import all_queries
from headscope.views.outputs import HeadGradients


@gradient_scorer(
    metric=metrics.loss,
    bounds=(0.0, None),
    queries=all_queries,
    needs=("causal",),
    source="Michel et al. 2019 (arXiv 1905.10650), section 4.1, as their code takes it by token",
)
def loss_sensitivity(gradients: HeadGradients, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Size of the first-order change of the loss when a head is scaled, token by token.

    ``|z_i . dL/dz_i|`` with z the head's output before the output projection and L the mean loss
    of the example, in nats from 0 up, mean over all queries; no norm over the layer is taken.
    ``hs.pruning.gradient_importance(over="token", normalise=False)`` is the same.

    Weakness: first order only, and it says nothing of the sign.
    """
    return (gradients.z * gradients.gradient).sum(-1).abs().transpose(1, 2)
