"""Package folders and the compiled module; everything else is in pyproject.toml."""

import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))

import native_build


class BuildAfresh(build):
    """Empties build/lib.* first: it keeps modules that were since moved or deleted."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Hands the build to csrc/native_build.py, which also runs without setuptools."""

    def run(self):
        folder = ROOT if self.inplace else Path(self.build_lib)
        try:
            print(native_build.build(folder / "recurx", by_pip=True), flush=True)
        except native_build.BuildError as error:
            raise CompileError(str(error)) from None


def readme() -> str:
    """README.md without its pictures, and with the words of its links to other files.

    A package index shows this text alone, and knows no folder that a relative address starts from.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    elsewhere = r"\]\((?![a-z]+:|#)[^)]*\)"
    text = re.sub(rf"!\[[^\]]*{elsewhere}\n*", "", text)
    return re.sub(rf"\[([^\]]*){elsewhere}", r"\1", text)


kernels = ["recurx.kernels", *(f"recurx.kernels.{name}" for name in find_packages("kernels"))]

setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["recurx", "recurx.*"]), *kernels],
    package_dir={"recurx": "recurx", "recurx.kernels": "kernels"},
    # Said here alone. With include_package_data the sdist's files would count as well, and
    # setuptools would take the folders of data for packages that nobody declared.
    include_package_data=False,
    package_data={"recurx": ["py.typed", "data/*", "**/*.safetensors", "**/*.j2"]},
    # No sources here: this line makes the wheel a platform wheel, BuildNative finds the files.
    ext_modules=[Extension("recurx._C", sources=[])],
    cmdclass={"build": BuildAfresh, "build_ext": BuildNative},
)
