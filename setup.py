"""Package folders and the compiled module; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))

import native_build


class BuildNative(build_ext):
    """Hands the build to csrc/native_build.py, which also runs without setuptools."""

    def run(self):
        folder = ROOT if self.inplace else Path(self.build_lib)
        try:
            print(native_build.build(folder / "recurx"), flush=True)
        except native_build.BuildError as error:
            raise CompileError(str(error)) from None


kernels = ["recurx.kernels", *(f"recurx.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["recurx", "recurx.*"]), *kernels],
    package_dir={"recurx": "recurx", "recurx.kernels": "kernels"},
    package_data={
        "recurx": ["py.typed", "bench/nets/*.safetensors", "data/*", "profiler/*.j2"],
    },
    # No sources here: this line makes the wheel a platform wheel, BuildNative finds the files.
    ext_modules=[Extension("recurx._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
