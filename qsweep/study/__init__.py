"""The driver of a sweep, its folder, its front and its plan."""

from qsweep.study.baselines import baselines
from qsweep.study.certainty import Member, Places
from qsweep.study.driver import run
from qsweep.study.folder import Live, SweepFolder
from qsweep.study.front import feasible, pareto
from qsweep.study.plan import Plan, check, plan

__all__ = [
    "Live", "Member", "Places", "Plan", "SweepFolder", "baselines", "check", "feasible", "pareto", "plan", "run",
]  # fmt: skip
