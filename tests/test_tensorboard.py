"""TensorBoard comes up in the environment that this project is installed in, and shows what a run has logged."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from conftest import Run


def free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return int(server.getsockname()[1])


def tags_served(port: int, server: subprocess.Popen[bytes], log: Path, run_name: str) -> set[str]:
    """The scalars' tags that the server has of the run, as soon as it has any."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with opener.open(f'http://127.0.0.1:{port}/data/plugin/scalars/tags', timeout=20) as answer:
                runs: dict[str, Any] = json.load(answer)
        except OSError:  # it is not up yet
            runs = {}
        if runs.get(run_name):
            return set(runs[run_name])
        time.sleep(0.2)
    raise AssertionError(f'no tags of {run_name}; TensorBoard said: {log.read_text()}')


def test_tensorboard_shows_a_run(forward_opt: dict[str, Any], run: Run, tmp_path: Path) -> None:
    forward_opt['train'].update(level_iter=1, total_iter=3, rewind_iter=1)
    forward_opt['val']['val_freq'] = 1
    forward_opt['logger']['use_tb_logger'] = True
    run(forward_opt)
    port, log = free_port(), tmp_path / 'tensorboard.txt'
    command = [sys.executable, '-m', 'tensorboard.main', '--logdir', 'tb_logger', '--host', '127.0.0.1']
    with log.open('w') as said:
        server = subprocess.Popen(
            [*command, '--port', str(port), '--load_fast=false'],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    try:
        tags = tags_served(port, server, log, 'forward')
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, which is what the test then fails for
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert {'losses/l_pix', 'levels/toyval/psnr', 'layer_density/conv_first.weight'} <= tags
