"""Findings: what the records of an audit show, with intervals and controls."""
