"""Lenses: vectors inside a model, read in the vocabulary.

Every layer at every position: :func:`logit_lens`. One logit as an exact sum of parts:
:func:`attribute`; over a probe, per head: :func:`head_attribution`. What single heads say:
:func:`head_lens`. Learned lenses, each judged on held-out text beside the plain one:
:func:`tuned_lens`, :func:`linear_shortcuts`, :func:`attention_lens`; read back by :func:`load`.
"""

from headscope.lens.attention import AttentionLens as AttentionLens
from headscope.lens.attention import attention_lens as attention_lens
from headscope.lens.attribution import attribute as attribute
from headscope.lens.attribution import head_attribution as head_attribution
from headscope.lens.fitting import FitReport as FitReport
from headscope.lens.linear import ResidualLens as ResidualLens
from headscope.lens.linear import linear_shortcuts as linear_shortcuts
from headscope.lens.linear import tuned_lens as tuned_lens
from headscope.lens.load import load as load
from headscope.lens.logit import head_lens as head_lens
from headscope.lens.logit import logit_lens as logit_lens
from headscope.lens.logit import logit_lenses as logit_lenses
from headscope.lens.reading import SITES as SITES
