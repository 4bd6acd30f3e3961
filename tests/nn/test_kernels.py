"""The GPU kernels without a GPU: interpreted, compiled, and where they are not available."""

import importlib.util
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bnlib.nn import kernels

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_the_kernels_in_tritons_interpreter():
    """Run test_kernels_on_device.py in a process of its own.

    Whether Triton interprets is settled when it is first imported, for the whole process, and
    another test of this process may have imported it.
    """
    file = Path(__file__).with_name("test_kernels_on_device.py")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-n", "0"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split(" passed")[0].split()[-1]) > 50


class TestAvailable:
    def test_not_on_a_cpu(self):
        x = torch.ones(4, 3)
        assert not kernels.available(x)
        with pytest.raises(ValueError, match=r"got torch.float32 on cpu.*bnlib.nn.functional"):
            kernels.moments(x)

    def test_not_without_triton(self, monkeypatch):
        copy = self.fresh_copy(monkeypatch, missing=True)
        assert not copy.available(torch.ones(4, 3))

    @needs_triton
    def test_not_where_the_variable_came_after_triton(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert not self.fresh_copy(monkeypatch).available(torch.ones(4, 3))

    def fresh_copy(self, monkeypatch, missing=False):
        if missing:
            monkeypatch.setitem(sys.modules, "triton", None)
        spec = importlib.util.spec_from_file_location("kernels_again", kernels.__file__)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "index"),
    [("fp16", "int32"), ("bf16", "int32"), ("fp32", "int32"), ("fp64", "int32"), ("fp32", "int64")],
)
def test_the_kernels_compile_for_a_gpu(dtype, index, monkeypatch, tmp_path):
    """Needs no GPU: the interpreter takes some programs that the compiler refuses."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tl = kernels.tl
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    constants = {"ROWS": 64, "CHANNELS": 64, "PARTS": 64, "INDEX": getattr(tl, index)}
    constants["DTYPE"] = getattr(tl, f"float{accumulator[2:]}")
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "dx_ptr", "dy_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("mean_ptr", "var_ptr", "invstd_ptr"), "*fp64")
    for kernel in (
        kernels._moments_of_chunks,
        kernels._merge_chunks,
        kernels._normalize,
        kernels._sums_of_chunks,
        kernels._input_gradient,
    ):
        types = {}
        for name in kernel.arg_names:
            if name in constants:
                types[name] = "constexpr"
            elif name.endswith("_ptr"):
                types[name] = pointers.get(name, f"*{accumulator}")
            else:
                types[name] = f"i{index[3:]}"
        used = {name: value for name, value in constants.items() if name in types}
        source = ASTSource(kernel, signature=types, constexprs=used)
        ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "st.local" not in ptx  # a tile that does not fit into the registers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_the_benchmark_prints_no_figure_without_a_gpu():
    root = Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/gpu.py"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "no GPU: unmeasured\n", "")
