"""Conformance checks for models, scorers and interventions.

Like scikit-learn's estimator checks: each function takes an object, runs all checks on it, raises
at the first failure, and returns a report.

hs.testing.check_model(model)          # from hs.load, or anything hs.load accepts
hs.testing.check_scorer(scorer)        # from hs.row_scorer or a similar decorator
hs.testing.check_intervention(edit)    # a function from heads to an edit, or an edit
"""

from headscope.testing.interventions import check_intervention as check_intervention
from headscope.testing.models import check_model as check_model
from headscope.testing.report import Check as Check
from headscope.testing.report import CheckError as CheckError
from headscope.testing.report import CheckReport as CheckReport
from headscope.testing.scorers import check_scorer as check_scorer
