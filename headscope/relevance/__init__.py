"""Token relevance: AtMan, label words as anchors, memorised text."""

from headscope.relevance.anchors import CutOff as CutOff
from headscope.relevance.anchors import Reweighted as Reweighted
from headscope.relevance.anchors import anchors as anchors
from headscope.relevance.anchors import pairwise_auc as pairwise_auc
from headscope.relevance.anchors import reweight as reweight
from headscope.relevance.atman import Suppressed as Suppressed
from headscope.relevance.atman import atman as atman
from headscope.relevance.atman import suppressed as suppressed
from headscope.relevance.memorized import memorized as memorized
from headscope.relevance.memorized import rare_attention as rare_attention
from headscope.relevance.memorized import weight_gradients as weight_gradients
from headscope.table.relevance import Anchors as Anchors
from headscope.table.relevance import Memorized as Memorized
from headscope.table.relevance import TokenRelevance as TokenRelevance
