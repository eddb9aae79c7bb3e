"""``python -m mssr_basicsr.train -opt options.yml``: BasicSR's own train_pipeline, writing under the current folder.

It takes the same options as ``basicsr/train.py``, which writes next to the package, that is, into site-packages for an
installed BasicSR.
"""

from __future__ import annotations

import os

from mssr_basicsr.adapter.discovery import load_basicsr


def main() -> None:
    """Run BasicSR's train_pipeline on the command line's options, with the current folder as its root."""
    load_basicsr()
    from basicsr.train import train_pipeline

    train_pipeline(os.getcwd())


if __name__ == '__main__':
    main()
