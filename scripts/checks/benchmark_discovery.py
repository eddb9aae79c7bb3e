"""What the start hook costs: medians of the time that Python takes to start and end, with the hook on, off and absent.

    python scripts/checks/benchmark_discovery.py [--runs 40]

Measured in two fresh environments that differ in the hook only; the three cases take turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def seconds_to_start(python: Path, hook: str) -> float:
    env = {**os.environ, 'MSSR_BASICSR_DISCOVERY': hook}
    start = time.perf_counter()
    subprocess.run([python, '-c', 'pass'], env=env, check=True)
    return time.perf_counter() - start


def environment(folder: Path, with_hook: bool) -> Path:
    venv.create(folder, symlinks=os.name != 'nt')
    python = folder / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    if with_hook:
        code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
        done = subprocess.run([python, '-c', code], check=True, text=True, stdout=subprocess.PIPE)
        shutil.copy(ROOT / 'mssr_basicsr.pth', done.stdout.strip())
    return python


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--runs', type=int, default=40, help='starts of Python per case')
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        without, with_ = (environment(Path(folder, str(hook)), hook) for hook in (False, True))
        cases = {'absent': (without, '1'), 'off': (with_, '0'), 'on': (with_, '1')}
        times: dict[str, list[float]] = {case: [] for case in cases}
        for case in [*cases] * (runs + 1):
            times[case].append(seconds_to_start(*cases[case]))
        medians = {
            case: 1000 * statistics.median(values[1:]) for case, values in times.items()
        }  # the first fills caches
    for case, median in medians.items():
        print(f'{case:>6}: {median:7.2f} ms ({median - medians["absent"]:+.2f})')


if __name__ == '__main__':
    main()
