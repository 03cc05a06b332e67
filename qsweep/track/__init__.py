"""MLflow runs of a sweep, its report, its table, its page in MLflow's UI, and the bundles that are published."""

from qsweep.track.client import tracking_uri
from qsweep.track.pareto import front, hypervolume
from qsweep.track.publish import publish
from qsweep.track.report import pareto_html
from qsweep.track.table import Table, front_table, full_table
from qsweep.track.view import pareto_url, report_url, ui

__all__ = [
    "Table",
    "front",
    "front_table",
    "full_table",
    "hypervolume",
    "pareto_html",
    "pareto_url",
    "publish",
    "report_url",
    "tracking_uri",
    "ui",
]
