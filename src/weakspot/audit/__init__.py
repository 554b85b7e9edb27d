"""Audits: attacks on many images in many regions, stored in a run that can be resumed, queried and compared."""

from weakspot.audit.execution.lifecycle import AuditInterrupt, AuditProgress, SessionOptions, audit, resume
from weakspot.audit.findings.comparison import Comparison, compare
from weakspot.audit.findings.contrasts import region_contrasts
from weakspot.audit.findings.curves import budget_curves
from weakspot.audit.findings.scores import score_findings
from weakspot.audit.findings.summary import Summary, summarize
from weakspot.audit.page.run_page import write_run_report
from weakspot.audit.plan.attack_plan import AttackPlan, ModelPlan
from weakspot.audit.plan.plan import Plan, read_plan
from weakspot.audit.store.digests import StoppedError
from weakspot.audit.store.run import Run, open_run, write_run

__all__ = [
    "AttackPlan",
    "AuditInterrupt",
    "AuditProgress",
    "Comparison",
    "ModelPlan",
    "Plan",
    "Run",
    "SessionOptions",
    "StoppedError",
    "Summary",
    "audit",
    "budget_curves",
    "compare",
    "open_run",
    "read_plan",
    "region_contrasts",
    "resume",
    "score_findings",
    "summarize",
    "write_run",
    "write_run_report",
]
