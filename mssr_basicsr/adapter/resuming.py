"""Exact resume: a resumed run sees the same data and draws the same random numbers as an uninterrupted run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from basicsr.data.prefetch_dataloader import CPUPrefetcher, CUDAPrefetcher
from basicsr.utils import get_root_logger


def random_state() -> dict[str, Any]:
    """The state of this process's random generators (Python's, NumPy's, torch's for the CPU and for its GPU).

    It consists of types that torch loads with ``weights_only``.
    """
    name, key, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (name, np.asarray(key).tolist(), *rest),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    version, key, gauss = state['python']
    random.setstate((version, tuple(key), gauss))
    np.random.set_state(tuple(state['numpy']))
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def epoch_to_resume(epoch: int, current_iter: int, num_batches: int) -> int:
    """The epoch in which a run continues after ``current_iter``: ``epoch``, unless that iteration is not in it.

    If it is not, epochs had another length when the state was saved. BasicSR continues with the saved number, with
    which all epochs may seem done if they have become longer.

    Args:
        epoch: as saved.
        current_iter: the last iteration that was trained.
        num_batches: the number of batches in an epoch of this run.
    """
    return epoch if 0 <= current_iter - epoch * num_batches <= num_batches else current_iter // num_batches


def resume_within_epoch(epoch: int, current_iter: int, state: dict[str, Any], num_batches: int | None) -> None:
    """Continue the interrupted epoch after the batch of ``current_iter``, with the random ``state`` of that moment.

    If an epoch does not have ``num_batches``, as when the state was saved, it starts over; None if that is not known.

    BasicSR starts that epoch over. Its prefetchers are reset at the start of an epoch; the next reset, and only that
    one, also loads and drops the batches that were already used, at the speed of data loading. This works for any
    dataset and number of workers, since their generators are reseeded in each epoch; but not for
    ``persistent_workers``, nor, without workers, for ``prefetch_mode: cpu`` or, on a GPU, ``cuda``, which draw the
    random numbers of later batches ahead of the training.
    """
    prefetchers: tuple[Any, ...] = (CPUPrefetcher, CUDAPrefetcher)
    original_resets = [prefetcher.reset for prefetcher in prefetchers]

    def reset(prefetcher: Any) -> None:
        for prefetcher_class, original in zip(prefetchers, original_resets):
            prefetcher_class.reset = original
        prefetcher.reset()
        logger, found = get_root_logger(), len(prefetcher.ori_loader)
        had = current_iter - epoch * found
        if num_batches in (found, None) and 0 <= had <= found:
            logger.info(f'Epoch {epoch} continues after {had} of its {found} batches; skipping those.')
            for _ in range(had):
                prefetcher.next()
        else:
            logger.warning('The data or the batch size has changed: the epoch starts over.')
        set_random_state(state)

    for prefetcher_class in prefetchers:
        prefetcher_class.reset = reset
