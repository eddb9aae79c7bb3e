"""Reading checkpoints: whatever is wrong with a file, one error says so."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mssr_basicsr.foundation.checks import first_line

_OF_DDP = 'module.'


class CheckpointError(ValueError):
    """A file is not the checkpoint that it should be; the text says why."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What ``torch.save`` wrote to ``path``, on the CPU; nothing in it is executed (``weights_only``).

    Raises:
        CheckpointError: the file is missing, truncated, damaged, not a checkpoint, or contains code.
    """
    try:
        if zipfile.is_zipfile(path):  # torch does not verify the checksums in it
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f'it is damaged: {damaged} in it does not have its checksum')
        loaded = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError('there is no such file') from error
    except CheckpointError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f'torch cannot read it; it may be truncated ({first_line(error)})') from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f'it is not a checkpoint, or holds more than tensors ({first_line(error)})') from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f'it holds a {type(loaded).__name__}, not a dict as a checkpoint does')
    return loaded


def state_dict_of(checkpoint: Mapping[str, Any], key: str | None, if_bare: str = '') -> dict[str, Tensor]:
    """The network under ``key`` (BasicSR's ``param_key_g``), else under ``params``; CheckpointError if there is none.

    Without a ``key`` the checkpoint is itself the state dict, as it is for BasicSR. If it is one although a ``key`` was
    given, ``if_bare``, which says what to do, is appended to the error. The prefix that a DDP wrapper adds to all names
    is removed.
    """
    if key is None:
        state: Any = checkpoint
    else:
        state = checkpoint.get(key, checkpoint.get('params'))
    if not _is_state_dict(state):
        found = ', '.join(sorted(map(str, checkpoint))[:4])
        if checkpoint and _is_state_dict(checkpoint):
            raise CheckpointError(f'it has no network under {key}, but is itself one{if_bare}')
        raise CheckpointError(f'it has no network under {key or "its root"} (it has {found or "nothing"})')
    if any(name.startswith(_OF_DDP) for name in state):
        return {name.removeprefix(_OF_DDP): tensor for name, tensor in state.items()}
    return state  # type: ignore[no-any-return]  # itself, not a copy: torch keeps the format's version as an attribute of it


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and isinstance(t, Tensor) for name, t in value.items())


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the ``tensors`` in which a value is NaN or infinite."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


@contextmanager
def loaded_strictly(state: Mapping[str, Tensor], network: nn.Module) -> Iterator[None]:
    """The context in which ``network`` loads ``state`` strictly: if it refuses it, a CheckpointError says why.

    The network decides, since it may accept what differs from its own state dict: batch normalisation takes a state
    dict without the counters that it had not yet before torch 0.4.1, and an architecture may rename old entries.
    """
    try:
        yield
    except RuntimeError as error:
        difference = _difference(state, network.state_dict())
        if not difference:
            raise
        raise CheckpointError(f'it is of another network: {difference}') from error


def _difference(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """In what the names and shapes in ``state`` differ from the ``expected``; empty if they do not."""
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    reshaped = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    faults = []
    if missing:
        faults.append(f'{len(missing)} tensors are missing, such as {missing[0]}')
    if unknown:
        faults.append(f'{len(unknown)} are unknown, such as {unknown[0]}')
    if reshaped:
        name = reshaped[0]
        shapes = f'{tuple(state[name].shape)} instead of {tuple(expected[name].shape)}'
        faults.append(f'{len(reshaped)} have a different shape, such as {name} {shapes}')
    return '; '.join(faults)
