"""Runs: what a command leaves on disk, and audits, which leave most."""

from weakspot.runs.auditing import Standing, audit, resume
from weakspot.runs.comparing import Comparison, compare
from weakspot.runs.contrasts import region_contrasts
from weakspot.runs.curves import budget_curves
from weakspot.runs.folder import write_run
from weakspot.runs.plan import AttackPlan, ModelPlan, Plan
from weakspot.runs.plan_files import read_mapping, read_plan
from weakspot.runs.reporting import write_run_report
from weakspot.runs.run import Run
from weakspot.runs.scores import score_findings
from weakspot.runs.stopping import StoppedError
from weakspot.runs.summary import Summary, summarize

__all__ = [
    "AttackPlan",
    "Comparison",
    "ModelPlan",
    "Plan",
    "Run",
    "Standing",
    "StoppedError",
    "Summary",
    "audit",
    "budget_curves",
    "compare",
    "read_mapping",
    "read_plan",
    "region_contrasts",
    "resume",
    "score_findings",
    "summarize",
    "write_run",
    "write_run_report",
]
