"""Findings of `r1pipe doctor`, which stages/doctor.py writes and the command line shows."""

from dataclasses import dataclass

PASS, WARN, FAIL = "pass", "warn", "fail"
ORDER = (PASS, WARN, FAIL)  # from good to bad


@dataclass(frozen=True)
class Finding:
    name: str
    status: str  # PASS, WARN or FAIL
    value: str  # what was measured
    remedy: str = ""
