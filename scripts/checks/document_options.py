"""Write docs/options.md from the options that the code declares.

    python scripts/checks/document_options.py

The text around the tables is in this file. A test checks that docs/options.md is up to date.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mssr_basicsr.adapter.stage_options import BackwardOptions, ForwardOptions, StageOptions, ValidationOptions
from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.losses.ssd_loss import SSDLoss
from mssr_basicsr.method.schedules import SequentialExpansion

DOCUMENT = Path(__file__).resolve().parents[2] / 'docs' / 'options.md'
TEMPLATE = """# Options

Made by `python scripts/checks/document_options.py` from the code; do not edit.

MSSR adds these options to BasicSR's YAML. Everything else in it stays as it is: datasets, losses, optimizers,
schedulers, EMA, validation, logging, and the options of the base model class. Before training starts, a wrong value is
an error that names the option, what was found and what is allowed. An option that nothing reads, at the top or under
`train`, `path`, `val`, `val.metrics`, `logger` or `datasets`, is reported with the nearest existing one.

## At the top

| option | default | meaning |
| --- | --- | --- |
| `model_type` | | `MSSRForwardModel`, `MSSRBackwardModel`, or `MSSRModel` for testing every level. |
| `base_model_type` | `SRModel` | The previous `model_type`, any class that derives from `SRModel`. |

## `network_g`, with `type: MSSR`

{arch}

## `train`, both stages

`total_iter` is the sum over the levels. `val.val_freq` must divide the iterations of each level, so that every level is
validated at its end. Optimizers, EMA, the learning-rate schedule and what BasicSR's model classes count in iterations
(`warmup_iter`, `net_d_init_iters`, `tsa_iter`, `fix_flow`) restart at each level: set them for one level.

{both}

## `train`, forward stage

{forward}

### `train.ssd_opt`, with `type: SSDLoss`

{ssd}

## `train`, backward stage

`path.pretrain_network_g` must be the last checkpoint of the forward stage.

{backward}

### `train.expansion`, with `type: SequentialExpansion`

{expansion}

## `val`

{validation}

To add your own criteria, schedules and losses: [extending.md](extending.md).
"""


def document() -> str:
    """The text of docs/options.md."""
    common = {field.name for field in dataclasses.fields(StageOptions)}
    return TEMPLATE.format(
        arch=table(arguments(MSSR)),
        both=table(declared(StageOptions)),
        forward=table(row for row in declared(ForwardOptions) if row[0] not in common),
        ssd=table(arguments(SSDLoss)),
        backward=table(row for row in declared(BackwardOptions) if row[0] not in common),
        expansion=table(arguments(SequentialExpansion)),
        validation=table(declared(ValidationOptions)),
    )


def table(rows: Iterable[tuple[str, Any, str]]) -> str:
    """Name, default and meaning of each option, as Markdown."""
    lines = ['| option | default | meaning |', '| --- | --- | --- |']
    for name, default, meaning in rows:
        shown = '' if default in (None, inspect.Parameter.empty) else f'`{as_yaml(default)}`'
        lines.append(f'| `{name}` | {shown} | {meaning.replace("|", chr(92) + "|")} |')
    return '\n'.join(lines)


def as_yaml(value: Any) -> str:
    """A default as one would write it in the YAML."""
    return str(list(value) if isinstance(value, tuple) else value).lower().replace("'", '"')


def declared(options: type) -> Iterator[tuple[str, Any, str]]:
    """The options of a dataclass declared with :func:`mssr_basicsr.foundation.checks.option`."""
    for field in dataclasses.fields(options):
        yield field.name, field.default, field.metadata['help']


def arguments(found: type) -> Iterator[tuple[str, Any, str]]:
    """The arguments of a class, each with its description from the ``Args`` section of the docstring."""
    section = re.search(r'Args:\n(.*?)(?=\n\n\S|\n\n    \S|\Z)', inspect.getdoc(found) or '', re.DOTALL)
    assert section is not None, f'{found.__name__} has no section Args'
    entries = dict(re.findall(r'^    (\w+): (.*?)(?=^    \w+: |\Z)', section[1] + '\n', re.MULTILINE | re.DOTALL))
    for name, parameter in inspect.signature(found).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            words = re.sub(r':\w+:`~?\.?([^`]+)`', r'`\1`', ' '.join(entries[name].split()))
            meaning = words.replace('``', '`')
            yield name, parameter.default, meaning[0].upper() + meaning[1:]


if __name__ == '__main__':
    DOCUMENT.write_text(document(), encoding='utf-8')
    print(DOCUMENT)
