import os
import platform
import re
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

from distutils.command.install_data import install_data  # isort: skip  (setuptools provides it from Python 3.12 on)

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1 it is wheel's
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:  # as when pip asks what the build requires
        bdist_wheel = object

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


# For GCC and Clang. What a processor supports is found out at run time; plain is NEON on ARM, and SSE2 on x86.
FLAGS = ['-O3', '-std=c11', '-fPIC', '-fvisibility=hidden', '-ffp-contract=fast', '-pthread', '-Wall', '-Wextra']
X86 = {
    'avx512': ['-DLANES=16', '-DROWS=6', '-mavx512f', '-mprefer-vector-width=512'],
    'avx2': ['-DLANES=8', '-DROWS=3', '-mavx2', '-mfma'],
    'plain': ['-DLANES=4', '-DROWS=3'],
}
OTHER = {'plain': ['-DLANES=4', '-DROWS=6']}


class BuildKernel(build_ext):
    """Compiles kernel.c once for each width of vectors, into one library that Python loads with ctypes.

    It includes neither Python's headers nor torch's, so that it fits every version of both. The extension being
    optional, the installation succeeds without it where there is no C compiler.
    """

    def build_extension(self, ext):
        widths = X86 if platform.machine().lower() in ('x86_64', 'amd64') else OTHER
        objects = []
        for name, flags in widths.items():
            # compile() names the object after the source: each width has a folder of its own.
            folder = os.path.join(self.build_temp, name)
            flags = [f'-DNAME={name}', *FLAGS, *flags]
            objects += self.compiler.compile(ext.sources, output_dir=folder, extra_postargs=flags)
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), extra_postargs=['-pthread'])

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split('.')) + '.so'

    def get_export_symbols(self, ext):
        return []


class WheelOfAnyPython(bdist_wheel):
    """The library is of a platform, but not of a version of Python."""

    def get_tag(self):
        return 'py3', 'none', super().get_tag()[2]


setup(
    distclass=DistributionWithPth,
    name='mssr-basicsr',
    # Read as text: the folder that this runs in need not be on sys.path.
    version=re.search(r"""__version__ = ['"](.+)['"]""", (HERE / 'mssr_basicsr' / '__init__.py').read_text('utf-8'))[1],
    description='Memory-friendly scalable super-resolution (MSSR) as a plugin for BasicSR',
    long_description=(HERE / 'README.md').read_text('utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='super-resolution BasicSR pruning lottery-ticket sparse image-restoration',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: C',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(9, 13)),
        'Topic :: Multimedia :: Graphics',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    python_requires='>=3.9',
    packages=find_packages(include=['mssr_basicsr', 'mssr_basicsr.*']),
    # Says what is true already, so that an editable install is a plain path entry: without it setuptools installs an
    # import hook of its own, which costs every start of Python several times what ours does.
    package_dir={'': '.'},
    package_data={'mssr_basicsr': ['py.typed']},
    data_files=[('', ['mssr_basicsr.pth'])],
    ext_modules=[Extension('mssr_basicsr.sparse.kernel', ['mssr_basicsr/sparse/kernel.c'], optional=True)],
    cmdclass={
        'install_data': InstallPth,
        'build_ext': BuildKernel,
        **({} if bdist_wheel is object else {'bdist_wheel': WheelOfAnyPython}),
    },
    # TensorBoard is left to BasicSR: it asks for tb-nightly, which owns the same `tensorboard` folder that the
    # `tensorboard` distribution would overwrite.
    install_requires=[
        'basicsr',
        'torch>=2.4',
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
        'completion': ['argcomplete'],
        'onnx': ['onnx', 'onnxscript', 'torch>=2.7'],
        'plot': ['matplotlib'],
        'test': [
            'argcomplete',
            'hypothesis',
            'matplotlib',
            'mypy',
            'onnx',
            'onnxruntime',
            'onnxscript',
            'pytest',
            'pytest-xdist>=3.2',
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
