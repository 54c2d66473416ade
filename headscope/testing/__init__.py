"""Conformance checks for models, scorers and interventions.

In the manner of scikit-learn's estimator checks: each function takes an object, tries
it, raises at the first thing that is wrong, and returns a report of what was checked.

hs.testing.check_model(model)          # from hs.load, or whatever hs.load takes
hs.testing.check_scorer(scorer)        # of hs.row_scorer and its like
hs.testing.check_intervention(edit)    # a function from heads to an edit, or an edit
"""

from headscope.testing.interventions import check_intervention as check_intervention
from headscope.testing.models import check_model as check_model
from headscope.testing.report import Check as Check
from headscope.testing.report import CheckError as CheckError
from headscope.testing.report import CheckReport as CheckReport
from headscope.testing.scorers import check_scorer as check_scorer
