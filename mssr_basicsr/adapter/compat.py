"""BasicSR on current software: one function per defect, each of which acts only where the defect is present.

:func:`before_import` and :func:`after_import` apply them all; :mod:`mssr_basicsr.adapter.discovery` calls them before
and after the import of BasicSR. The fixes for machines without CUDA are in :mod:`mssr_basicsr.adapter.cpu`, those in a
training script in :mod:`mssr_basicsr.adapter.training_script`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

from mssr_basicsr.adapter import cpu
from mssr_basicsr.adapter.backbone_options import with_backbone_options
from mssr_basicsr.adapter.dataset_errors import datasets_name_files
from mssr_basicsr.adapter.option_files import read_yaml
from mssr_basicsr.adapter.training_script import prepare_script
from mssr_basicsr.foundation.patching import patch, replaced

_FUNCTIONAL_TENSOR = 'torchvision.transforms.functional_tensor'


def before_import() -> None:
    """Apply what ``import basicsr`` itself needs. Safe to call repeatedly."""
    provide_functional_tensor()


def after_import() -> None:
    """Apply, in place, what BasicSR needs once it has been imported. Safe to call repeatedly.

    Projects that bring a copy of BasicSR have left out what they do not use, so each repair is by itself.
    """
    for module, name, wrapper in _repairs():
        path, _, function = name.rpartition('.')
        try:
            found = importlib.import_module(f'basicsr.{module}' if module else 'basicsr')
        except Exception as error:
            if not (isinstance(error, ModuleNotFoundError) and f'basicsr.{module}'.startswith(str(error.name))):
                warnings.warn(f'basicsr.{module} is not repaired: {error!r}', RuntimeWarning, stacklevel=1)
            continue
        with suppress(AttributeError):
            patch(attrgetter(path)(found) if path else found, function, wrapper)
    with suppress(ImportError):
        provide_color_conversions()


def _repairs() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """What to wrap: the module of BasicSR, the function in it, and by what."""
    # All of these have bound the function by its name; a script that runs later takes it from basicsr.utils.options.
    for module in ('', 'train', 'test', 'utils.options'):
        yield module, 'parse_options', use_roots
        yield module, 'parse_options', name_wrong_yaml
        yield module, 'parse_options', accept_local_rank
        yield module, 'parse_options', prepare_script
    yield 'utils.dist_util', '_init_dist_pytorch', cpu.launch_on_cpu
    yield 'utils.dist_util', '_init_dist_slurm', cpu.launch_on_cpu
    yield 'models.base_model', 'BaseModel.__init__', with_backbone_options
    yield 'models.base_model', 'BaseModel.model_to_device', cpu.parallel_on_cpu
    yield 'data.prefetch_dataloader', 'CUDAPrefetcher.__init__', cpu.prefetch_on_cpu
    # The models have bound it by its name; copies of them that others have take it from basicsr.utils.img_process_util.
    for module in ('models.realesrnet_model', 'models.realesrgan_model', 'utils.img_process_util'):
        yield module, 'filter2D', cpu.filter_on_cpu
    yield 'archs.basicvsrpp_arch', 'BasicVSRPlusPlus.__init__', cpu.align_on_cpu
    for module in ('', 'train', 'utils', 'utils.logger'):
        yield module, 'init_wandb_logger', provide_wandb_ids
    yield 'utils.registry', 'DATASET_REGISTRY.get', datasets_name_files
    for registry in ('MODEL_REGISTRY', 'ARCH_REGISTRY'):
        yield 'utils.registry', f'{registry}.get', cpu.classes_on_cpu


def provide_functional_tensor() -> None:
    """Where torchvision (>= 0.17) lacks ``transforms.functional_tensor``, which BasicSR 1.4.2 imports: provide it.

    If nothing else finds that name, importing it gives the module to which torchvision has renamed it.
    """
    if not any(isinstance(finder, _FunctionalTensorFinder) for finder in sys.meta_path):
        sys.meta_path.append(_FunctionalTensorFinder())


def use_roots(parse_options: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``parse_options``: ``path.experiments_root`` and ``path.results_root`` of the YAML are used.

    BasicSR 1.4.2 replaces them by folders under its own root; in its master, as here, the run's folder is in them.
    """
    parsed = parse_options(*args, **kwargs)
    if isinstance(parsed, tuple):  # copies of BasicSR may return the options alone
        opt, arguments = parsed
        asked, paths = read_yaml(Path(arguments.opt)).get('path') or {}, opt['path']
        for root in ('experiments_root', 'results_root'):
            if asked.get(root) and root in paths:
                old, new = paths[root], os.path.join(os.path.expanduser(asked[root]), opt['name'])
                for key in (root, 'models', 'training_states', 'log', 'visualization'):
                    if key in paths:
                        paths[key] = paths[key].replace(old, new, 1)
    return parsed


def name_wrong_yaml(parse_options: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``parse_options``: a YAML that is empty, a list or invalid is an error that names the file.

    BasicSR assumes that it contains a mapping.
    """
    try:
        return parse_options(*args, **kwargs)
    except Exception:
        for option, path in zip(sys.argv, sys.argv[1:]):
            if option in ('-opt', '--opt'):
                read_yaml(Path(path))
        raise


def accept_local_rank(parse_options: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``parse_options``: ``--local-rank``, as ``torch.distributed.launch`` passes it since torch 2, is accepted.

    BasicSR's parser only knows ``--local_rank``. ``sys.argv`` is restored afterwards.
    """
    if '--local-rank' in inspect.unwrap(parse_options).__code__.co_consts:
        return parse_options(*args, **kwargs)
    argv = [re.sub(r'^--local-rank(?==|$)', '--local_rank', arg) for arg in sys.argv]
    with replaced(sys, 'argv', argv):
        return parse_options(*args, **kwargs)


def provide_color_conversions() -> None:
    """Give ``basicsr.utils.matlab_functions`` the colour conversions that it had in BasicSR 1.3.

    HAT imports them from there. BasicSR has moved them to ``basicsr.utils.color_util``.
    """
    from basicsr.utils import color_util, matlab_functions

    for name in ('rgb2ycbcr', 'bgr2ycbcr', 'ycbcr2rgb', 'ycbcr2bgr'):
        if not hasattr(matlab_functions, name):
            setattr(matlab_functions, name, getattr(color_util, name))


def provide_wandb_ids(init_wandb_logger: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``init_wandb_logger``: wandb without ``util.generate_id``, which BasicSR calls, gets its successor."""
    wandb = importlib.import_module('wandb')
    if not hasattr(wandb.util, 'generate_id'):
        wandb.util.generate_id = importlib.import_module('wandb.sdk.lib.runid').generate_id
    return init_wandb_logger(*args, **kwargs)


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
