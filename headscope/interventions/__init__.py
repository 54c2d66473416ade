"""Interventions as values: what a head becomes, for any heads of any model.

    hs.ablate_heads(model, probe, metric, hs.interventions.Mean(reference=other))
    hs.ablate_heads(model, probe, metric, "mean")        # the same, with the probe as reference

An intervention says what happens; heads, positions and batches are the caller's. The same object
serves single heads, groups, cumulative ablations, estimates and pruning curves.
"""

from headscope.interventions.catalogue import NAMED as NAMED
from headscope.interventions.catalogue import AttendToFirst as AttendToFirst
from headscope.interventions.catalogue import Denoise as Denoise
from headscope.interventions.catalogue import Entmax as Entmax
from headscope.interventions.catalogue import FreezePattern as FreezePattern
from headscope.interventions.catalogue import Intervention as Intervention
from headscope.interventions.catalogue import Mean as Mean
from headscope.interventions.catalogue import MeanPos as MeanPos
from headscope.interventions.catalogue import Patch as Patch
from headscope.interventions.catalogue import Place as Place
from headscope.interventions.catalogue import Resample as Resample
from headscope.interventions.catalogue import Scale as Scale
from headscope.interventions.catalogue import Setting as Setting
from headscope.interventions.catalogue import TopK as TopK
from headscope.interventions.catalogue import Uniform as Uniform
from headscope.interventions.catalogue import Zero as Zero
from headscope.interventions.catalogue import named as named
from headscope.interventions.catalogue import partners_of as partners_of
