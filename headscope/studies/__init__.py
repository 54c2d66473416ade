"""Studies: tests of a paper's claims on a model.

hs.studies.list()                                     # study names and one-line descriptions result
= hs.studies.run("induction-heads", model)     # a number, a control and a verdict per claim
result.verdicts                                       # {"pattern": "holds", ...}
"""

from headscope.studies.run import STUDIES as STUDIES
from headscope.studies.run import StudyCost as StudyCost
from headscope.studies.run import cost as cost
from headscope.studies.run import list_studies as list_studies
from headscope.studies.run import page_of as page_of
from headscope.studies.run import run as run
from headscope.studies.run import run_all as run_all
from headscope.studies.run import show as show
from headscope.studies.study import Answer as Answer
from headscope.studies.study import Claim as Claim
from headscope.studies.study import Evidence as Evidence
from headscope.studies.study import Study as Study
from headscope.studies.study import StudyResult as StudyResult
from headscope.studies.study import StudySetting as StudySetting
from headscope.studies.study import paired as paired

list = list_studies
