"""Runs: what a command leaves on disk, and audits, which leave most."""

from weakspot.runs.auditing import Standing, StoppedError, audit, resume
from weakspot.runs.folder import write_run
from weakspot.runs.plan import AttackPlan, ModelPlan, Plan
from weakspot.runs.plan_files import read_mapping, read_plan
from weakspot.runs.reporting import write_run_report
from weakspot.runs.run import Run
from weakspot.runs.summary import Summary, summarize

__all__ = [
    "AttackPlan",
    "ModelPlan",
    "Plan",
    "Run",
    "Standing",
    "StoppedError",
    "Summary",
    "audit",
    "read_mapping",
    "read_plan",
    "resume",
    "summarize",
    "write_run",
    "write_run_report",
]
