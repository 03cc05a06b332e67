"""The driver of a sweep, its folder, its front and its plan."""

from qsweep.study.baselines import baselines
from qsweep.study.certainty import Member, membership
from qsweep.study.driver import run
from qsweep.study.folder import Live, SweepFolder
from qsweep.study.front import feasible, pareto
from qsweep.study.plan import Plan, check, plan

__all__ = [
    "Live", "Member", "Plan", "SweepFolder", "baselines", "check", "feasible", "membership", "pareto",
    "plan", "run",
]  # fmt: skip
