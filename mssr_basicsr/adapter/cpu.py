"""BasicSR without CUDA: one function per defect, each of which acts only where there is none.

:func:`mssr_basicsr.adapter.compat.after_import` applies them. Wherever CUDA is in use, BasicSR behaves as before.
"""

from __future__ import annotations

import atexit
import dis
import gc
import inspect
import sys
from collections.abc import Mapping
from types import FunctionType
from typing import Any, Callable

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from mssr_basicsr.foundation.bytecode import codes_in
from mssr_basicsr.foundation.patching import patch, replaced


def load_resume_state_on_cpu(load_resume_state: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``load_resume_state``: without CUDA the state is loaded to the CPU. BasicSR requires a CUDA device."""
    if torch.cuda.is_available():
        return load_resume_state(*args, **kwargs)
    load = torch.load

    def load_to_cpu(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
        return load(f, map_location='cpu', **kwargs)

    with replaced(torch.cuda, 'current_device', lambda: 0), replaced(torch, 'load', load_to_cpu):
        return load_resume_state(*args, **kwargs)


def launch_on_cpu(init_dist: Callable[..., Any], backend: str, *args: Any, **kwargs: Any) -> None:
    """Wraps ``_init_dist_pytorch`` and ``_init_dist_slurm``: without CUDA, gloo stands in for nccl.

    BasicSR divides by the number of GPUs, and chooses one of them.
    """
    if torch.cuda.is_available():
        init_dist(backend, *args, **kwargs)
        return
    with replaced(torch.cuda, 'device_count', lambda: 1), replaced(torch.cuda, 'set_device', lambda device: None):
        init_dist('gloo' if backend == 'nccl' else backend, *args, **kwargs)
    atexit.register(leave_process_group)


def leave_process_group() -> None:
    """End gloo's threads before Python exits: one that outlives it occasionally aborts the process.

    BasicSR never leaves its process group.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()  # the threads end with the last reference to the group; a distributed network has one


def parallel_on_cpu(model_to_device: Callable[..., Any], model: Any, net: torch.nn.Module) -> Any:
    """Wraps ``BaseModel.model_to_device``: a network on the CPU is distributed without CUDA's device ids."""
    if model.device.type != 'cpu' or not model.opt['dist']:
        return model_to_device(model, net)
    find_unused_parameters = model.opt.get('find_unused_parameters', False)
    return DistributedDataParallel(net.to(model.device), find_unused_parameters=find_unused_parameters)


def prefetch_on_cpu(init: Callable[..., Any], prefetcher: Any, loader: Any, opt: dict[str, Any]) -> None:
    """Wraps ``CUDAPrefetcher.__init__``: for a run on the CPU it becomes a ``CPUPrefetcher``, which needs no stream."""
    from basicsr.data.prefetch_dataloader import CPUPrefetcher

    if opt['num_gpu'] != 0:
        init(prefetcher, loader, opt)
        return
    prefetcher.__class__ = CPUPrefetcher
    prefetcher.__init__(loader)


def filter_on_cpu(filter2d: Callable[..., torch.Tensor], img: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Wraps ``filter2D``: an image on the CPU may have any strides, as ``DiffJPEG``'s output does.

    BasicSR calls ``view`` on the padded image, which is always contiguous with CUDA.
    """
    return filter2d(img.contiguous() if img.device.type == 'cpu' else img, kernel)


def align_on_cpu(init: Callable[..., Any], network: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Wraps ``BasicVSRPlusPlus.__init__``: without CUDA it aligns its features too, by the same convolutions.

    BasicSR leaves them out there, which gives a different network. torchvision's run on a CPU.
    """
    with replaced(torch.cuda, 'is_available', lambda: True):
        init(network, *args, **kwargs)


def classes_on_cpu(get: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps a registry's ``get``: methods of the class that name CUDA use the CPU when running on it.

    Real-ESRGAN's models, video validation and BasicVSR++ on long clips do so, in BasicSR and in other projects' copies.
    The methods are patched where they are defined, so subclasses get them too.
    """
    from basicsr.models.base_model import BaseModel

    found = get(*args, **kwargs)
    for owner in found.__mro__ if isinstance(found, type) else ():
        if owner not in (BaseModel, torch.nn.Module):  # these use the device that they are given
            for name, method in list(vars(owner).items()):
                if isinstance(method, FunctionType) and _names_cuda(method):
                    patch(owner, name, method_on_cpu)
    return found


def method_on_cpu(method: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps a method of a model or a network: in a run on the CPU, ``.cuda()`` and ``device='cuda'`` mean the CPU.

    A model runs on the CPU if its options have ``num_gpu: 0``, a network if there is no CUDA. Before a model has its
    options, they are looked for among the arguments; without any, the method runs as it is.
    """
    if isinstance(owner, torch.nn.Module):
        on_cpu = not torch.cuda.is_available()
    else:
        options = (vars(owner).get('opt'), *args, *kwargs.values())
        on_cpu = next((opt['num_gpu'] for opt in options if isinstance(opt, Mapping) and 'num_gpu' in opt), None) == 0
    if not on_cpu:
        return method(owner, *args, **kwargs)
    with _CUDAMeansCPU():
        return method(owner, *args, **kwargs)


def _names_cuda(function: FunctionType) -> bool:
    """Whether there is ``x.cuda`` or ``'cuda'`` in the code. ``torch.cuda.empty_cache`` and its like need no CUDA."""
    for code in codes_in(getattr(inspect.unwrap(function), '__code__', function.__code__)):
        instructions = list(dis.get_instructions(code))
        if any(b.argval == 'cuda' and a.argval != 'torch' for a, b in zip(instructions, instructions[1:])):
            return True
    return False


class _CUDAMeansCPU(TorchFunctionMode):
    """While it is entered, ``.cuda()`` and every argument that names a CUDA device mean the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device and sys._getframe(1).f_globals['__name__'].partition('.')[0] == 'torch':
            # By this torch finds the module torch.cuda, which it keeps for the whole process.
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.cuda:
            result = args[0]
        else:
            args = [self._on_cpu(arg) for arg in args]
            result = func(*args, **{name: self._on_cpu(arg) for name, arg in (kwargs or {}).items()})
        if func in (torch.Tensor.cuda, torch.Tensor.to) and result is args[0] and type(result) is torch.Tensor:
            # What is moved to CUDA is another tensor: VideoRecurrentModel squeezes the original in place afterwards.
            return result.view_as(result)
        return result

    @staticmethod
    def _on_cpu(arg: Any) -> Any:
        return 'cpu' if isinstance(arg, (str, torch.device)) and str(arg).startswith('cuda') else arg
