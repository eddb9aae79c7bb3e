"""The generated pages in docs/ match the code."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'scripts' / 'checks'))

import document_options  # noqa: E402


def test_the_options_are_those_of_the_code() -> None:
    assert document_options.DOCUMENT.read_text('utf-8') == document_options.document()
