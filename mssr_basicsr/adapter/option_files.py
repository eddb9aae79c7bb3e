"""Reading a YAML file of options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mssr_basicsr.foundation.checks import first_line


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file, as BasicSR reads them; if there are none, a ValueError that names the file."""
    from basicsr.utils.options import ordered_yaml

    try:
        opt = yaml.load(path.read_text('utf-8'), Loader=ordered_yaml()[0])
    except yaml.YAMLError as error:
        mark, problem = getattr(error, 'problem_mark', None), getattr(error, 'problem', None) or first_line(error)
        where = '' if mark is None else f' in line {mark.line + 1}'
        raise ValueError(f'{path}: {problem}{where}; allowed: a YAML file, indented with spaces') from error
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: found bytes that are not UTF-8; allowed: a YAML file') from error
    if not isinstance(opt, dict):
        what = 'nothing' if opt is None else f'a {type(opt).__name__}'
        raise ValueError(f'{path}: found {what}; allowed: a mapping of options, including network_g and scale')
    return opt
