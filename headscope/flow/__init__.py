"""Information flow: token-to-token contributions, rollout, and routes of a prompt.

hs.flow.rollout(model, probe).matrix           # attention multiplied over layers
hs.flow.alti(model, probe).matrix              # the same, on the vectors that attention moves
hs.flow.norms(model, probe).norm_share         # how much each head moves between tokens
hs.flow.through_heads(model, probe, "needle")  # rollout from the needle through each head
hs.flow.source_contribution(model, probe)      # share of a translation that comes from its source
hs.flow.routes(model, "The cat sat").edges     # what each head passes to the last position
"""

from headscope.flow.contributions import alti as alti
from headscope.flow.contributions import alti_logits as alti_logits
from headscope.flow.contributions import norm_matrix as norm_matrix
from headscope.flow.contributions import norms as norms
from headscope.flow.contributions import source_contribution as source_contribution
from headscope.flow.rollout import flow_of as flow_of
from headscope.flow.rollout import max_flow as max_flow
from headscope.flow.rollout import rolled_out as rolled_out
from headscope.flow.rollout import rollout as rollout
from headscope.flow.rollout import through_heads as through_heads
from headscope.flow.routes import proximity_shares as proximity_shares
from headscope.flow.routes import route_scores as route_scores
from headscope.flow.routes import routes as routes
