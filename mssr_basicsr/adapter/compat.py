"""BasicSR on current software: one function per defect, each of which acts only where the defect is present.

:func:`before_import` and :func:`after_import` apply them all; :mod:`mssr_basicsr.adapter.discovery` calls both around
the import of BasicSR. Wherever CUDA is in use, BasicSR does exactly what it did.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Callable

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from mssr_basicsr.adapter.option_files import read_yaml
from mssr_basicsr.foundation.checkpoints import first_line
from mssr_basicsr.foundation.checks import OptionError

_FUNCTIONAL_TENSOR = 'torchvision.transforms.functional_tensor'


def before_import() -> None:
    """Apply what ``import basicsr`` itself needs. Safe to call again."""
    provide_functional_tensor()


def after_import() -> None:
    """Apply, in place, what BasicSR needs once it has been imported. Safe to call again."""
    import basicsr.archs.basicvsrpp_arch
    import basicsr.data.prefetch_dataloader
    import basicsr.models.base_model
    import basicsr.models.realesrgan_model
    import basicsr.models.realesrnet_model
    import basicsr.test
    import basicsr.train
    import basicsr.utils.dist_util
    import basicsr.utils.img_process_util
    import basicsr.utils.options
    import basicsr.utils.registry

    # All of these have bound the function by its name; a script that runs later takes it from basicsr.utils.options.
    for module in (basicsr, basicsr.train, basicsr.test, basicsr.utils.options):
        _patch(module, 'parse_options', name_wrong_yaml)
        _patch(module, 'parse_options', accept_local_rank)
        _patch(module, 'parse_options', prepare_resuming)
    _patch(basicsr.utils.dist_util, '_init_dist_pytorch', launch_on_cpu)
    _patch(basicsr.utils.dist_util, '_init_dist_slurm', launch_on_cpu)
    _patch(basicsr.models.base_model.BaseModel, 'model_to_device', parallel_on_cpu)
    _patch(basicsr.data.prefetch_dataloader.CUDAPrefetcher, '__init__', prefetch_on_cpu)
    # The models have bound it by its name; copies of them that others have take it from basicsr.utils.img_process_util.
    for module in (basicsr.models.realesrnet_model, basicsr.models.realesrgan_model, basicsr.utils.img_process_util):
        _patch(module, 'filter2D', filter_on_cpu)
    _patch(basicsr.archs.basicvsrpp_arch.BasicVSRPlusPlus, '__init__', align_on_cpu)
    _patch(basicsr.utils.registry.DATASET_REGISTRY, 'get', datasets_name_files)
    for registry in (basicsr.utils.registry.MODEL_REGISTRY, basicsr.utils.registry.ARCH_REGISTRY):
        _patch(registry, 'get', classes_on_cpu)


def provide_functional_tensor() -> None:
    """Where torchvision (>= 0.17) lacks ``transforms.functional_tensor``, which BasicSR 1.4.2 imports: the successor.

    An import of that name finds what torchvision has renamed it to, when nothing else finds it.
    """
    if not any(isinstance(finder, _FunctionalTensorFinder) for finder in sys.meta_path):
        sys.meta_path.append(_FunctionalTensorFinder())


def name_wrong_yaml(parse_options: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``parse_options``: a YAML that is empty, a list, or none at all, is an error that names the file.

    BasicSR takes what is in it for a mapping.
    """
    try:
        return parse_options(*args, **kwargs)
    except Exception:
        for option, path in zip(sys.argv, sys.argv[1:]):
            if option in ('-opt', '--opt'):
                read_yaml(Path(path))
        raise


def accept_local_rank(parse_options: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``parse_options``: ``--local-rank``, as ``torch.distributed.launch`` writes it since torch 2, is accepted.

    BasicSR's parser knows ``--local_rank`` only. ``sys.argv`` is as before afterwards.
    """
    if '--local-rank' in inspect.unwrap(parse_options).__code__.co_consts:
        return parse_options(*args, **kwargs)
    argv = [re.sub(r'^--local-rank(?==|$)', '--local_rank', arg) for arg in sys.argv]
    with _replaced(sys, 'argv', argv):
        return parse_options(*args, **kwargs)


def prepare_resuming(parse_options: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``parse_options``: the training script that calls it gets a ``load_resume_state`` with the fixes below.

    ``basicsr/train.py`` mostly runs as ``__main__``, where no import hook sees that function. But it parses its options
    before it looks for a state to resume from.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and 'load_resume_state' not in frame.f_globals:
        frame = frame.f_back
    if frame is not None:
        script = sys.modules[frame.f_globals['__name__']]
        _patch(script, 'load_resume_state', load_resume_state_on_cpu)
        _patch(script, 'load_resume_state', name_unreadable_state)
    return parse_options(*args, **kwargs)


def load_resume_state_on_cpu(load_resume_state: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``load_resume_state``: without CUDA the state is loaded to the CPU. BasicSR asks for a CUDA device."""
    if torch.cuda.is_available():
        return load_resume_state(*args, **kwargs)
    load = torch.load

    def load_to_cpu(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
        return load(f, map_location='cpu', **kwargs)

    with _replaced(torch.cuda, 'current_device', lambda: 0), _replaced(torch, 'load', load_to_cpu):
        return load_resume_state(*args, **kwargs)


def name_unreadable_state(load_resume_state: Callable[..., Any], opt: dict[str, Any]) -> Any:
    """Wraps ``load_resume_state``: the error about a state that torch cannot read names it. torch's own does not."""
    try:
        return load_resume_state(opt)
    except Exception as error:
        allowed = f'a whole state ({first_line(error)})'
        raise OptionError('path.resume_state', opt['path'].get('resume_state'), allowed) from error


def launch_on_cpu(init_dist: Callable[..., Any], backend: str, *args: Any, **kwargs: Any) -> None:
    """Wraps ``_init_dist_pytorch`` and ``_init_dist_slurm``: without CUDA, gloo stands in for nccl.

    BasicSR divides by the number of GPUs, and chooses one of them.
    """
    if torch.cuda.is_available():
        init_dist(backend, *args, **kwargs)
        return
    with _replaced(torch.cuda, 'device_count', lambda: 1), _replaced(torch.cuda, 'set_device', lambda device: None):
        init_dist('gloo' if backend == 'nccl' else backend, *args, **kwargs)


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
    """Wraps ``filter2D``: an image on the CPU may have any strides, as ``DiffJPEG`` gives them.

    BasicSR views the padded image, which CUDA always makes contiguous.
    """
    return filter2d(img.contiguous() if img.device.type == 'cpu' else img, kernel)


def align_on_cpu(init: Callable[..., Any], network: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Wraps ``BasicVSRPlusPlus.__init__``: without CUDA it aligns its features too, by the same convolutions.

    BasicSR leaves them out there, which makes another network. torchvision's run on a CPU.
    """
    with _replaced(torch.cuda, 'is_available', lambda: True):
        init(network, *args, **kwargs)


def datasets_name_files(get: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps a registry's ``get``: a dataset without images, or with one that cannot be read, is an error that names it.

    BasicSR divides by the number of images, and takes what OpenCV could not decode for an image.
    """
    dataset = get(*args, **kwargs)
    for name, wrapper in (('__init__', refuse_empty_dataset), ('__getitem__', name_unreadable_image)):
        if isinstance(dataset, type) and hasattr(dataset, name):
            _patch(dataset, name, wrapper)
    return dataset


def refuse_empty_dataset(
    init: Callable[..., Any], dataset: Any, opt: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """Wraps ``__init__`` of a dataset: OptionError, which names the folders, if there is nothing in it."""
    init(dataset, opt, *args, **kwargs)
    if hasattr(dataset, '__len__') and len(dataset) == 0:
        folders = {key: value for key, value in opt.items() if key.startswith('dataroot')}
        raise OptionError(f'datasets.{opt.get("phase")}', folders, 'folders, or LMDBs, with images in them')


def name_unreadable_image(getitem: Callable[..., Any], dataset: Any, index: int) -> Any:
    """Wraps ``__getitem__`` of a dataset: what it raises names the files of the item."""
    try:
        return getitem(dataset, index)
    except Exception as error:
        items = next((getattr(dataset, name) for name in ('paths', 'keys') if hasattr(dataset, name)), None)
        if isinstance(error, IndexError) or not isinstance(items, Sequence):  # an iteration over the dataset ends so
            raise
        item = items[index]
        files = ', '.join(f'{key} {path}' for key, path in item.items()) if isinstance(item, Mapping) else item
        # A worker's error is made anew from its text in the main process: a type that takes a text alone.
        message = f'datasets.{dataset.opt.get("phase")}: cannot read {files} ({first_line(error)})'
        raise ValueError(message) from error


def classes_on_cpu(get: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps a registry's ``get``: methods of the class that call CUDA by name use the CPU where it is what computes.

    Real-ESRGAN's models, the validation of video and BasicVSR++ on long clips do so, in BasicSR and in the copies that
    others have of them. The methods are patched where they are defined, so whoever extends the class has them too.
    """
    from basicsr.models.base_model import BaseModel

    found = get(*args, **kwargs)
    for owner in found.__mro__ if isinstance(found, type) else ():
        if owner not in (BaseModel, torch.nn.Module):  # which do as they are told
            for name, method in list(vars(owner).items()):
                if isinstance(method, FunctionType) and _names_cuda(method):
                    _patch(owner, name, method_on_cpu)
    return found


def method_on_cpu(method: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps a method of a model or a network: in a run on the CPU, ``.cuda()`` and ``device='cuda'`` mean the CPU.

    A model runs on the CPU if its options have ``num_gpu: 0``, a network if there is no CUDA.
    """
    if isinstance(owner, torch.nn.Module):
        on_cpu = not torch.cuda.is_available()
    else:
        opt = vars(owner).get('opt') or inspect.signature(method).bind(owner, *args, **kwargs).arguments['opt']
        on_cpu = opt['num_gpu'] == 0
    if not on_cpu:
        return method(owner, *args, **kwargs)
    with _CUDAMeansCPU():
        return method(owner, *args, **kwargs)


def _names_cuda(code: FunctionType | CodeType) -> bool:
    """Whether there is ``x.cuda`` or ``'cuda'`` in the code. ``torch.cuda.empty_cache`` and its like need no CUDA."""
    if isinstance(code, FunctionType):
        code = getattr(inspect.unwrap(code), '__code__', code.__code__)
    instructions = list(dis.get_instructions(code))
    if any(b.argval == 'cuda' and a.argval != 'torch' for a, b in zip(instructions, instructions[1:])):
        return True
    return any(_names_cuda(constant) for constant in code.co_consts if isinstance(constant, CodeType))


class _CUDAMeansCPU(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


class _FunctionalTensorFinder:
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, _FunctionalTensorLoader()) if name == _FUNCTIONAL_TENSOR else None


class _FunctionalTensorLoader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        try:
            successor = importlib.import_module('torchvision.transforms._functional_tensor')
        except ModuleNotFoundError:
            successor = importlib.import_module('torchvision.transforms.functional')
        sys.modules[module.__name__] = successor  # `import` returns what is found here


def _patch(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Let ``owner.name(...)`` call ``wrapper(<what it was>, ...)``, once however often this is called."""
    original = getattr(owner, name)
    applied: tuple[Callable[..., Any], ...] = getattr(original, 'mssr_basicsr_wrappers', ())
    if wrapper in applied:
        return

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    patched.__dict__['mssr_basicsr_wrappers'] = (*applied, wrapper)
    setattr(owner, name, patched)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
