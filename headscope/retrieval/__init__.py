"""Retrieval heads: what a model copies from far back while it answers, head by head."""

from headscope.retrieval.agreement import Agreement as Agreement
from headscope.retrieval.agreement import agreement as agreement
from headscope.retrieval.decore import Contrast as Contrast
from headscope.retrieval.decore import DeCoReProcessor as DeCoReProcessor
from headscope.retrieval.decore import decore as decore
from headscope.retrieval.follow import follow as follow
from headscope.retrieval.forms import Retrieval as Retrieval
from headscope.retrieval.forms import decoded as decoded
from headscope.retrieval.forms import forced as forced
from headscope.retrieval.groups import activity as activity
from headscope.retrieval.groups import by_kv_head as by_kv_head
from headscope.retrieval.masking_curve import MaskingConfig as MaskingConfig
from headscope.retrieval.masking_curve import masking_curve as masking_curve
from headscope.retrieval.masking_curve import masking_curves as masking_curves
from headscope.retrieval.masks import Mask as Mask
from headscope.retrieval.masks import mask_heads as mask_heads
from headscope.retrieval.need import need as need
from headscope.retrieval.recall import word_recall as word_recall
from headscope.retrieval.rotary import RotaryContributions as RotaryContributions
from headscope.retrieval.rotary import rotary_contributions as rotary_contributions
from headscope.retrieval.runs import Run as Run
from headscope.retrieval.runs import Runs as Runs
from headscope.retrieval.writing import Generated as Generated
from headscope.retrieval.writing import generate as generate
