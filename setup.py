import re
from pathlib import Path

from setuptools import Distribution, find_packages, setup

from distutils.command.install_data import install_data  # isort: skip  (setuptools provides it from Python 3.12 on)

HERE = Path(__file__).resolve().parent


class InstallPth(install_data):
    """Puts ``data_files`` at the root of site-packages, the only place where Python reads a ``.pth``.

    Their usual place is the environment's folder (``sys.prefix``). Wheels and editable wheels both fill a folder
    that stands for site-packages, ``install_lib``; from there pip records the file, and ``pip uninstall`` removes it.
    """

    def finalize_options(self):
        self.set_undefined_options('install', ('install_lib', 'install_dir'))
        super().finalize_options()


class DistributionWithPth(Distribution):
    # An editable wheel installs data files too, if has_data() says that there are any. But setuptools itself calls
    # this method has_data_files(), so it never does (seen in setuptools 64 to 84).
    has_data = Distribution.has_data_files


setup(
    distclass=DistributionWithPth,
    name='mssr-basicsr',
    # Read as text: the folder that this runs in need not be on sys.path.
    version=re.search(r"""__version__ = ['"](.+)['"]""", (HERE / 'mssr_basicsr' / '__init__.py').read_text('utf-8'))[1],
    description='Memory-friendly scalable super-resolution (MSSR) as a plugin for BasicSR',
    long_description=(HERE / 'README.md').read_text('utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    packages=find_packages(include=['mssr_basicsr', 'mssr_basicsr.*']),
    # Says what is true already, so that an editable install is a plain path entry: without it setuptools installs an
    # import hook of its own, which costs every start of Python several times what ours does.
    package_dir={'': '.'},
    data_files=[('', ['mssr_basicsr.pth'])],
    cmdclass={'install_data': InstallPth},
    # TensorBoard is left to BasicSR: it asks for tb-nightly, which owns the same `tensorboard` folder that the
    # `tensorboard` distribution would overwrite.
    install_requires=[
        'basicsr',
        'torch>=2.1',
        'numpy',
        'opencv-python',
        'lmdb',
        'pillow>=11.3',
        'pyyaml',
        'safetensors',
        'setuptools<82',  # the pkg_resources in it, without which TensorBoard does not start
        'tifffile',
        'tqdm',
        'xxhash>=3',
        'zstandard',
    ],
    extras_require={
        'onnx': ['onnx', 'onnxscript', 'torch>=2.6'],
        'plot': ['matplotlib'],
        'test': [
            'hypothesis',
            'matplotlib',
            'mypy',
            'onnx',
            'onnxruntime',
            'onnxscript',
            'pytest',
            'ruff',
            'setuptools>=64,<82',
            'spandrel',
            'types-PyYAML',
            'types-tqdm',
            'wheel',
        ],
    },
    entry_points={'console_scripts': ['mssr = mssr_basicsr.commands.main:main']},
    zip_safe=False,
)
