"""Geometry of hidden states: spread, curvature, dimension and similarity across layers.

table = hs.geometry.layers(model)    # entropy, curvature, dimension, ... after every block
hs.plots.layers(table)
"""

from headscope.geometry.layers import heads as heads
from headscope.geometry.layers import invariance as invariance
from headscope.geometry.layers import layers as layers
from headscope.geometry.measures import anisotropy as anisotropy
from headscope.geometry.measures import curvature as curvature
from headscope.geometry.measures import dime as dime
from headscope.geometry.measures import gride as gride
from headscope.geometry.measures import info_nce as info_nce
from headscope.geometry.measures import lidar as lidar
from headscope.geometry.measures import linearity as linearity
from headscope.geometry.measures import matrix_entropy as matrix_entropy
from headscope.geometry.measures import mean_cosine as mean_cosine
from headscope.geometry.measures import neighbourhood_overlap as neighbourhood_overlap
from headscope.geometry.measures import self_similarity as self_similarity
from headscope.geometry.measures import token_angle as token_angle
from headscope.geometry.measures import two_nn as two_nn
from headscope.geometry.position import Anova as Anova
from headscope.geometry.position import PositionContext as PositionContext
from headscope.geometry.position import anova as anova
from headscope.geometry.position import position_context as position_context
from headscope.geometry.position import position_heads as position_heads
from headscope.geometry.position import position_layers as position_layers
from headscope.geometry.spectral import RotaryBands as RotaryBands
from headscope.geometry.spectral import high_frequency_gain as high_frequency_gain
from headscope.geometry.spectral import rotary_bands as rotary_bands
