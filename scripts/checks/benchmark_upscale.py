"""Memory and processor time of ``mssr upscale`` on a 1280 x 720 image: by default, whole, another version.

    python scripts/checks/benchmark_upscale.py MODEL.mssr [--level 4] [--rounds 1] [--before CHECKOUT]

Each figure is that of 1280 x 720 less that of 16 x 16, so that the interpreter and its libraries do not count; ratios
are to the last line. CHECKOUT is another version of this repository, such as one that ``git worktree add`` made;
where it has a MODEL.mssr of its own at the same place, it gets that, since it may read another version of the format.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path)
    parser.add_argument('--level', type=int, default=4)
    parser.add_argument('--rounds', type=int, default=1, help='number of runs; the smallest figures count')
    parser.add_argument('--before', type=Path, metavar='CHECKOUT')
    arguments = parser.parse_args()
    versions = {'by default': (HERE, []), '--tile 0': (HERE, ['--tile', '0'])}
    if arguments.before:
        versions['before'] = (arguments.before.resolve(), [])
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        small, large, output = (os.path.join(folder, name) for name in ('small.png', 'large.png', 'out.png'))
        Image.effect_noise((16, 16), 60).convert('RGB').save(small)
        Image.effect_noise((1280, 720), 60).convert('RGB').save(large)
        for _ in range(arguments.rounds):
            for name, (checkout, options) in versions.items():
                model = checkout / arguments.model if (checkout / arguments.model).is_file() else arguments.model
                command = [str(model.resolve()), '--level', str(arguments.level)]
                found = [
                    cost(checkout, [*command, image, '-o', output, *options, '--device', 'cpu'])
                    for image in (large, small)
                ]
                difference = tuple(one - other for one, other in zip(*found))
                costs[name] = tuple(map(min, difference, costs.get(name, difference)))
    for name, (mib, seconds) in costs.items():
        last = costs[list(versions)[-1]]
        ratios = f'{mib / last[0]:6.3f} of memory, {seconds / last[1]:6.3f} of time'
        print(f'{name:12}{mib:8.0f} MiB {seconds:8.2f} s of processor time; {ratios}')


def cost(checkout: Path, arguments: list[str]) -> tuple[float, float]:
    """Peak memory in MiB and processor seconds of one upscaling in a process of its own."""
    program = 'import sys; from mssr_basicsr.commands.main import main; sys.exit(main())'
    command = [sys.executable, '-c', program, 'upscale', *arguments]
    process = subprocess.Popen(command, cwd=checkout, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


if __name__ == '__main__':
    main()
