"""Builds dcnv2_d2._C, the compiled operators: for the CPU always, for CUDA when it can be used or is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    raise SystemExit(
        "dcnv2_d2 compiles its operators against the PyTorch they will run with, and no PyTorch was found here. "
        "Install torch first, then run: pip install --no-build-isolation -e ."
    ) from None

ROOT = Path(__file__).resolve().parent


def find_cuda_home():
    """The first candidate that really is a toolkit: a wrapper script of nvcc on the PATH can mislead torch's guess."""
    candidates = (os.environ.get("CUDA_HOME"), cpp_extension.CUDA_HOME, "/usr/local/cuda")
    return next((c for c in candidates if c and (Path(c) / "include" / "cuda_runtime.h").is_file()), None)


def default_architectures(home):
    """Every generation users have, as far as the toolkit knows it, plus PTX for later ones."""
    nvcc = Path(home) / "bin" / "nvcc"
    command = [nvcc if nvcc.is_file() else "nvcc", "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True).stdout
    wanted = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
    chosen = [a for a in wanted if f"compute_{a.replace('.', '')}" in known.split()] or ["7.5", "8.0", "8.6", "9.0"]
    return ";".join(chosen) + "+PTX"


def decide_cuda():
    """Returns (whether to compile the CUDA sources, the reason)."""
    forced = os.environ.get("FORCE_CUDA") == "1"
    if torch.version.cuda is None:
        if forced:
            raise SystemExit(f"FORCE_CUDA=1, but torch {torch.__version__} is a build without CUDA.")
        return False, f"torch {torch.__version__} is a build without CUDA"
    home = find_cuda_home()
    if home is None or not (shutil.which("nvcc") or (Path(home) / "bin" / "nvcc").is_file()):
        if forced:
            raise SystemExit("FORCE_CUDA=1, but no CUDA toolkit was found; set CUDA_HOME to the one to use.")
        return False, "no CUDA toolkit (nvcc) was found"
    if not forced and not torch.cuda.is_available():
        return False, "no GPU is present (FORCE_CUDA=1 compiles for CUDA all the same)"
    cpp_extension.CUDA_HOME = home
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures(home))
    return True, "FORCE_CUDA=1" if forced else f"found {torch.cuda.get_device_name(0)} and the toolkit at {home}"


def extension():
    sources = [ROOT / "csrc" / "library.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    # No -std (torch chooses), no -march (wheels travel; the kernels dispatch by themselves), no debug symbols.
    # Loops with floating-point comparisons are vectorised only where these cannot trap; pairs of bfloat16 are also read
    # as one number.
    cxx = ["-O3", "-fno-trapping-math", "-fno-strict-aliasing", "-g0"] if os.name != "nt" else ["/O2"]
    # Without OpenMP at::parallel_for silently runs on one thread.
    openmp = ["-fopenmp"] if os.name != "nt" else ["/openmp"]
    compile_args = {"cxx": cxx + openmp}
    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with_cuda, reason = decide_cuda() if cuda_sources else (False, "this version has no CUDA sources")
    print(f"dcnv2_d2: building for {'CPU and CUDA' if with_cuda else 'CPU only'}: {reason}.", flush=True)
    macros = []
    if with_cuda:
        sources += cuda_sources
        macros.append(("WITH_CUDA", None))
        compile_args["nvcc"] = ["-O3"]
    build = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return build(
        "dcnv2_d2._C",
        # Relative paths: setuptools refuses absolute ones in an sdist.
        [str(s.relative_to(ROOT)) for s in sources],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=openmp if os.name != "nt" else [],
    )


class BuildPy(build_py):
    """Puts configs/ to where dcnv2_d2.model_zoo finds it in an installed package; an editable one reads the folder."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "dcnv2_d2" / "model_zoo" / "configs"
            shutil.rmtree(target, ignore_errors=True)  # a config of an earlier build may have gone
            shutil.copytree(ROOT / "configs", target)


setup(ext_modules=[extension()], cmdclass={"build_py": BuildPy, "build_ext": cpp_extension.BuildExtension})
