"""Make the quickstart's x2 data, without a download, from photographs that scikit-image (which BasicSR needs) ships.

    python scripts/quickstart_data.py

writes OUTPUT/train (96-pixel squares, so that little is decoded for each training crop) and OUTPUT/val (whole
photographs), each the gt.lmdb and lq_x2.lmdb of scripts/prepare_data.py. Running it again does nothing.

Seven photographs are far too few to train a model worth keeping: this is to see the method at work.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from prepare_data import DataError, prepare

# Where the quickstart's options look for it, whichever folder (this one, a BasicSR checkout, ...) they are run in.
DEFAULT = Path.home() / '.cache' / 'mssr_basicsr' / 'quickstart'

# In every scikit-image since 0.22. No scene is on both sides (the two motorcycles are one scene seen by two cameras).
# Left out are the JPEGs (rocket, retina, hubble_deep_field), since compression artefacts would be ground truth, and
# what is no photograph of the everyday world (moon, cell, ihc, charts). Every other colour photograph validates.
TRAIN = ('motorcycle_left', 'motorcycle_right', 'camera', 'brick', 'grass', 'gravel', 'coins')
VAL = ('astronaut', 'chelsea', 'coffee')


def make(output: Path) -> None:
    """Write OUTPUT/train and OUTPUT/val where they are not there yet, and say what they hold."""
    package = find_spec('skimage')
    if package is None or package.origin is None:
        raise DataError('scikit-image is not installed: pip install scikit-image')
    photographs = Path(package.origin).parent / 'data'
    missing = [f'{name}.png' for name in TRAIN + VAL if not (photographs / f'{name}.png').is_file()]
    if missing:
        raise DataError(f"scikit-image's {photographs} lacks {', '.join(missing)}: install it with pip")
    for part, names, sub_image, step in (('train', TRAIN, 96, 48), ('val', VAL, None, None)):
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                shutil.copy(photographs / f'{name}.png', folder)
            made = prepare(folder, output / part, 2, sub_image, step)
        count = len((output / part / 'gt.lmdb' / 'meta_info.txt').read_text().splitlines())
        state = 'prepared' if made else 'already prepared'
        print(f'{output / part}: {state}, {count} HR/LR pairs from {", ".join(names)}')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=DEFAULT, help='folder to make (%(default)s)')
    try:
        make(parser.parse_args(argv).output)
    except DataError as error:
        sys.exit(f'quickstart_data: {error}')


if __name__ == '__main__':
    main()
