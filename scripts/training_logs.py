"""Timings from BasicSR's training logs."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from statistics import median

_TIMED = re.compile(r'time \(data\): ([\d.]+) \(([\d.]+)\)')  # seconds per iteration, and of these for data
_STAMP = re.compile(r'^(\S+ \S+),\d+ INFO', re.MULTILINE)


def read_logs(experiment: Path) -> list[str]:
    """The logs in an experiment's folder, oldest first; a resumed training has several."""
    return [log.read_text() for log in sorted(experiment.glob('train_*.log'))]


def iteration_seconds(logs: list[str]) -> tuple[float, float]:
    """Seconds per iteration, and how many of them are spent waiting for data: medians over the log lines."""
    totals, data = zip(*(map(float, found) for log in logs for found in _TIMED.findall(log)))
    return median(totals), median(data)


def wall_seconds(logs: list[str]) -> float:
    """Seconds from the first line of each log to its last, together."""
    times = [[datetime.fromisoformat(stamp) for stamp in _STAMP.findall(log)] for log in logs]
    return sum((stamps[-1] - stamps[0]).total_seconds() for stamps in times)
