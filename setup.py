"""Builds the extension fastnca._C; the project's metadata is in pyproject.toml.

kernels.cpp is compiled once per instruction set, with that set's flags on that object alone: nothing else in the
binary may use them, and the best set is chosen at run time. FASTNCA_BUILD_EXT=0 installs without the extension.
"""

import glob
import os
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
        "amx_bf16": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    }

FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]


class BuildKernels(build_ext):
    def build_extension(self, ext):
        try:
            ext.extra_objects = []
            for name, flags in INSTRUCTION_SETS.items():
                ext.extra_objects += self.compiler.compile(
                    ["csrc/kernels.cpp"],
                    output_dir=os.path.join(self.build_temp, name),
                    macros=[("FASTNCA_ISA", name)],
                    extra_postargs=[*FLAGS, *flags, "-falign-functions=64"],
                    depends=ext.depends,
                )
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            raise SystemExit(
                f"fastnca: the C++ kernels could not be compiled ({error}).\n"
                "A C++17 compiler (g++ or clang, chosen by the variables CC and CXX) is needed; "
                "FASTNCA_BUILD_EXT=0 installs without the kernels."
            ) from error


extension = Extension(
    "fastnca._C",
    sources=["csrc/dispatch.cpp", "csrc/module.cpp", "csrc/rollout.cpp"],
    depends=[*sorted(glob.glob("csrc/*.h")), "csrc/kernels.cpp"],  # the sdist takes its files from here too
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    py_limited_api=True,
    language="c++",
)

if os.environ.get("FASTNCA_BUILD_EXT", "1") == "0":
    setup()
else:
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
