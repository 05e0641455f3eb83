"""What the tests of Triton kernels share: Triton's interpreter, and compilation without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""What a program can have on every device of the compute capability; of 8.x on 8.6."""


def interpret(script: str, *arguments: Path) -> None:
    """Run a Python script in which Triton interprets its kernels; it does so from its import on, or never."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths})


def compiled_without_spills(
    kernel: Any, types: Mapping[str, str], constants: dict[str, Any], options: dict[str, object], capability: int
) -> bool:
    """Compile a kernel for a device that need not be there; whether it fits shared memory and spills no register.

    Args:
        kernel: to compile.
        types: of its arguments by name, `*fp32` a pointer; pointers are aligned to 16 bytes.
        constants: its other arguments.
        options: of the compilation.
        capability: 80 or 90.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        chip = f"sm_{capability}" + ("a" if capability == 90 else "")
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={chip}", "-o", os.devnull, str(ptx)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    fits = compiled.metadata.shared <= SHARED_BYTES[capability]
    return fits and "0 bytes spill stores, 0 bytes spill loads" in report
