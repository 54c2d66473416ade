"""Sweeps: resumable, shardable ablation studies defined by config files, with tables as results."""

from headscope.sweeps.cluster import RayExecutor as RayExecutor
from headscope.sweeps.config import SweepConfig as SweepConfig
from headscope.sweeps.config import read_config as read_config
from headscope.sweeps.config import schema as schema
from headscope.sweeps.results import Results as Results
from headscope.sweeps.results import export as export
from headscope.sweeps.results import read as read
from headscope.sweeps.run import Outcome as Outcome
from headscope.sweeps.run import make_plan as make_plan
from headscope.sweeps.run import run_sweep as run_sweep
from headscope.sweeps.store import Status as Status
from headscope.sweeps.store import status as status
