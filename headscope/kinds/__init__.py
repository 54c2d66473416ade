"""Catalogue of kinds of attention heads: definitions, tests, and confirmation by ablation."""

from headscope.kinds.catalogue import KINDS as KINDS
from headscope.kinds.catalogue import UNASKED as UNASKED
from headscope.kinds.catalogue import survey as survey
from headscope.kinds.measures import AskedModel as AskedModel
from headscope.kinds.measures import CannotAskError as CannotAskError
from headscope.kinds.measures import Confirm as Confirm
from headscope.kinds.measures import Criterion as Criterion
from headscope.kinds.measures import Kind as Kind
from headscope.kinds.measures import LabelledTexts as LabelledTexts
from headscope.kinds.measures import Unasked as Unasked
from headscope.kinds.measures import above as above
from headscope.kinds.measures import below as below
from headscope.kinds.measures import cluster_ratio as cluster_ratio
from headscope.kinds.measures import clustering as clustering
from headscope.kinds.measures import lead_in_layer as lead_in_layer
from headscope.kinds.measures import mean_embedding as mean_embedding
from headscope.kinds.measures import of_relation as of_relation
from headscope.kinds.measures import one_sided as one_sided
from headscope.kinds.measures import placements as placements
from headscope.kinds.measures import relation_scores as relation_scores
from headscope.kinds.measures import separations as separations
from headscope.kinds.measures import told_apart as told_apart
from headscope.kinds.measures import without_norm as without_norm
from headscope.table.kinds import Finding as Finding
from headscope.table.kinds import KindFacts as KindFacts
from headscope.table.kinds import KindTable as KindTable
