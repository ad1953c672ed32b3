"""Builds `pyggml._native`: one cffi API-mode extension that holds every kernel once per instruction set.

`kernels.c` is compiled once for each entry of ISAS that the target machine type has; dispatch.c picks one at run time,
so a build made on one machine runs on any other. A machine without a working C compiler still installs the package:
the extension is then left out and pyggml computes with numpy.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cffi import FFI
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, LinkError, PlatformError

HERE = Path(__file__).parent
FOLDERS = ("native", "tests", "tools", "models", ".ci")       # a source distribution is the whole repository
HEADERS = ("blocks.h", "codebooks.h")       # installed beside the package: the numpy codecs read them without an extension

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
# AVX-VNNI has AVX-512 VNNI's products of 32 bytes under an encoding of its own. For tests on a processor that only has the latter,
# PYGGML_EVEX_AVXVNNI=1 builds the same source with the other encoding.
EVEX_AVXVNNI = bool(os.environ.get("PYGGML_EVEX_AVXVNNI"))
AVXVNNI = [*AVX2, *(["-mavx512vnni", "-mavx512vl"] if EVEX_AVXVNNI else ["-mavxvnni"])]
# half the time to compile of what hardly a processor runs where there are others; the warning needs more analysis than that
SCALAR = ["-O1", "-Wno-maybe-uninitialized"]
ISAS = {        # rising order of preference
    "x86_64": {"scalar": SCALAR, "avx2": AVX2, "avxvnni": AVXVNNI, "avx512": AVX512, "avx512bf16": AVX512BF16,
               "amx": [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]},
    "aarch64": {"scalar": SCALAR, "neon": ["-march=armv8.2-a+dotprod+fp16"]},
}
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-psabi"]
# Results must not depend on the compiler's mood: contraction is asked for by vf_fma alone.
COMMON = ["-std=gnu11", "-O3", "-g0", "-fno-math-errno", "-ffp-contract=off", "-pthread", *WARNINGS]


def machine() -> str:
    """The machine type that is built for: `x86_64`, `aarch64`, ... (PYGGML_MACHINE for a cross build)."""
    import platform
    name = os.environ.get("PYGGML_MACHINE") or platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def isas() -> dict[str, list[str]]:
    """Instruction sets to build with their flags: all that the machine type has, or those named in PYGGML_ISAS (for development)."""
    every = ISAS.get(machine(), {"scalar": []})
    wanted = os.environ.get("PYGGML_ISAS", "").split(",")
    if unknown := [name for name in wanted if name and name not in every]:
        raise SystemExit(f"PYGGML_ISAS names {unknown[0]!r}, which {machine()} does not have; use some of {','.join(every)}")
    return {name: flags for name, flags in every.items() if wanted == [""] or name == "scalar" or name in wanted}


def declarations(*names: str) -> str:
    """The C declarations of headers as cffi wants them: without preprocessor lines."""
    return "\n".join(line for name in names for line in (HERE / name).read_text().splitlines() if not line.startswith("#"))


def ffi_builder(module: str) -> FFI:
    """The cffi interface: block layouts (packed structs) and the functions of api.h."""
    ffi = FFI()
    ffi.cdef(declarations("blocks.h"), packed=True)
    ffi.cdef(declarations("api.h"))
    ffi.set_source(module, '#include "blocks.h"\n#include "api.h"')
    return ffi


class BuildNative(build_ext):
    """`build_ext` that adds the cffi glue and one object of kernels.c per instruction set."""

    def get_source_files(self):
        """What a source distribution carries beside the package."""
        root = HERE.parent
        files = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*")) if path.is_file())
        return [str(path.relative_to(root)) for path in files if "__pycache__" not in path.parts]

    def run(self):
        try:
            super().run()
        except (CCompilerError, CompileError, LinkError, PlatformError, OSError) as error:
            if os.environ.get("PYGGML_REQUIRE_NATIVE"):
                raise
            self.warn(f"no native kernels ({error}); pyggml will compute with numpy, which is slow. Install a C compiler and reinstall.")
            for ext in self.extensions:
                ext.optional = True
        if not self.inplace:
            headers = Path(self.get_ext_fullpath("pyggml._native")).parent / "_headers"
            headers.mkdir(parents=True, exist_ok=True)
            for name in HEADERS:
                shutil.copy(HERE / name, headers / name)

    def build_extension(self, ext):
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        glue = temp / "_native.c"
        ffi_builder(ext.name).emit_c_code(str(glue))
        include = [str(HERE)]
        extra = os.environ.get("PYGGML_CFLAGS", "").split()

        def compile_isa(item):
            isa, flags = item
            macros = [("ISA", isa), (f"ISA_{isa}", "1")]
            return self.compiler.compile([str(HERE / "kernels.c")], output_dir=str(temp / isa), include_dirs=include, macros=macros,
                                         extra_postargs=[*COMMON, *flags, *extra], depends=[str(p) for p in HERE.rglob("*.h")])

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for objects in pool.map(compile_isa, isas().items()):
                ext.extra_objects += objects
        ext.sources = [*(os.path.relpath(p) for p in sorted(HERE.glob("*.c")) if p.name != "kernels.c"), str(glue)]
        ext.include_dirs += include
        ext.define_macros += [("ISA_LIST(X)", " ".join(f"X({isa})" for isa in isas())), ("EVEX_AVXVNNI", str(int(EVEX_AVXVNNI)))]
        ext.depends += [str(p) for p in HERE.rglob("*.h")]
        ext.extra_compile_args += [*COMMON, *extra]
        ext.extra_link_args += ["-pthread", "-lm", *extra]
        super().build_extension(ext)
