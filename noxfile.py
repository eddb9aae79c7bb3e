"""What .github/workflows/tests.yml runs, on one machine: ``nox``, or one part of it: ``nox -p 3.12 -k master``.

``BASICSR_MASTER`` names a checkout of BasicSR's master; without it, that half of the matrix is skipped.
"""

from __future__ import annotations

import os

import nox

nox.options.error_on_missing_interpreters = False


@nox.session(python=['3.9', '3.10', '3.11', '3.12'])
@nox.parametrize('basicsr', ['1.4.2', 'master'])
def tests(session: nox.Session, basicsr: str) -> None:
    """Lint, types and tests in an environment of its own."""
    source = 'basicsr==1.4.2' if basicsr == '1.4.2' else os.environ.get('BASICSR_MASTER')
    if source is None:
        session.skip('BASICSR_MASTER names no checkout of BasicSR')
    install_basicsr(session, source, 'torch', 'torchvision')
    session.run('bash', 'scripts/test.sh', *session.posargs, external=True)


@nox.session(python='3.10')
def oldest_torch(session: nox.Session) -> None:
    """The tests with the oldest torch that setup.py allows, whose types differ from those that mypy is to check."""
    install_basicsr(session, 'basicsr==1.4.2', 'torch==2.4.*', 'torchvision==0.19.*')
    session.install('-e', '.[test]')
    session.run('python', '-m', 'pytest', '-n', 'auto', '--maxprocesses', '4', *session.posargs)


def install_basicsr(session: nox.Session, source: str, *torch: str) -> None:
    """In this order and without build isolation: BasicSR's setup.py needs torch."""
    session.install(*torch)
    session.install('cython', 'numpy', 'setuptools<82', 'wheel')
    session.install('--no-build-isolation', source)
