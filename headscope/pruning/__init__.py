"""Head pruning: importance, orders, curves, and models with heads removed.

Importance: :func:`gradient_importance`, :func:`ablation_importance`, and, without a metric,
:func:`weight_norm`, :func:`output_norm`, :func:`confidence`. Orders: :func:`one_shot` by any score,
:func:`iterative`, :func:`greedy`, :func:`random_order`, or gates from :func:`learn_gates`. Cost of
each: :func:`pruning_curve`. The smaller model: :func:`prune`, :func:`load_pruned`.
"""

from headscope.pruning.gates import LearnedGates as LearnedGates
from headscope.pruning.gates import learn_alphas as learn_alphas
from headscope.pruning.gates import learn_gates as learn_gates
from headscope.pruning.orders import PruningCurve as PruningCurve
from headscope.pruning.orders import ablation_importance as ablation_importance
from headscope.pruning.orders import confidence as confidence
from headscope.pruning.orders import gradient_importance as gradient_importance
from headscope.pruning.orders import greedy as greedy
from headscope.pruning.orders import iterative as iterative
from headscope.pruning.orders import one_shot as one_shot
from headscope.pruning.orders import output_norm as output_norm
from headscope.pruning.orders import pruning_curve as pruning_curve
from headscope.pruning.orders import random_order as random_order
from headscope.pruning.orders import weight_norm as weight_norm
from headscope.pruning.structure import Size as Size
from headscope.pruning.structure import load_pruned as load_pruned
from headscope.pruning.structure import measure_size as measure_size
from headscope.pruning.structure import prune as prune
