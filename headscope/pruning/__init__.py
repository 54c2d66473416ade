"""Which heads a model can do without, and the model without them."""

from headscope.pruning.structure import load_pruned as load_pruned
from headscope.pruning.structure import prune as prune
