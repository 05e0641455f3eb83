"""The Triton kernels of a metric learner: in Triton's interpreter against torch, and compiled without a GPU."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from pldr_train.model import refining
from pldr_train.model.refining import Sizes
from tests.unit.triton_case import compiled_without_spills, interpret

pytest.importorskip("triton", reason="Triton is not installed")

from pldr_train.model import refining_kernel

pytestmark = pytest.mark.slow

PAPER = Sizes(64, 170, 2, 8, True)
IN_THE_INTERPRETER = """
import sys
import torch
import triton.language as tl
from functools import partial
from triton.runtime.interpreter import InterpreterBuilder
from pldr_train.model import refining_kernel
from pldr_train.model.refining import Kernels, Sizes, compare, example

interpreted = InterpreterBuilder.create_dot

def create_dot(builder, *factors_and_more):
    # The interpreter multiplies the codes of bf16 numbers; as fp32 they are the same numbers.
    wide = [builder.cast_impl(each, tl.float32) if getattr(each, "dtype", None) == tl.bfloat16 else each
            for each in factors_and_more]
    return interpreted(builder, *wide)

InterpreterBuilder.create_dot = create_dot
for arguments, dtype, rows, columns in torch.load(sys.argv[1]):
    sizes = Sizes(*arguments)
    shape = refining_kernel.Shape(sizes.part, columns, 1, 1)
    kernels = Kernels(*(partial(each, shape=shape)
                        for each in (refining_kernel.evaluate, refining_kernel.evaluate_backward)))
    rows, gradient, weights = example(torch.device("cpu"), dtype, sizes, rows)
    compare(kernels, rows, gradient, weights)
"""
CASES = [
    (Sizes(16, 42, 2, 2, True), torch.float32, 70, 32),
    (Sizes(20, 53, 1, 3, False), torch.float32, 64, 16),
    (Sizes(32, 8, 3, 1, True), torch.float32, 1, 32),
    (Sizes(64, 170, 2, 1, True), torch.float32, 66, 32),
    (Sizes(72, 40, 2, 1, True), torch.float32, 40, 32),
    (Sizes(16, 42, 2, 2, True), torch.bfloat16, 70, 32),
    (Sizes(64, 170, 1, 2, True), torch.bfloat16, 66, 32),
]


def test_the_kernels_compute_what_is_written_out(tmp_path: Path) -> None:
    cases = [(list(vars(sizes).values()), *others) for sizes, *others in CASES]
    torch.save(cases, tmp_path / "cases.pt")
    interpret(IN_THE_INTERPRETER, tmp_path / "cases.pt")


@pytest.mark.parametrize(
    ("sizes", "capability"),
    [(PAPER, 80), (PAPER, 90), (Sizes(32, 85, 2, 4, False), 80), (Sizes(128, 341, 2, 8, True), 90)],
)
def test_they_compile_within_shared_memory_and_without_spills(sizes: Sizes, capability: int) -> None:
    shapes = refining_kernel.shapes_of(sizes.d, divmod(capability, 10))
    assert shapes is not None
    wide = ("metric", "norm_weight", "norm_bias", "refined", "sums", "gradient", "of_metric", "of_vectors")
    biases = ("inner_bias", "outer_bias") if sizes.has_bias else ()
    factors = ("inner_weight", "outer_weight", "inputs", "hidden", "of_hidden", "of_outputs", *biases)
    types = dict.fromkeys(factors, "*bf16") | dict.fromkeys(wide, "*fp32") | {"rows": "i32", "eps": "fp32"}
    forward = refining_kernel.refine_kernel, refining_kernel.forward_constants(sizes, shapes.forward)
    backward = refining_kernel.refine_backward_kernel, refining_kernel.backward_constants(sizes, shapes.backward)
    for (kernel, constants), shape in zip((forward, backward), (shapes.forward, shapes.backward), strict=True):
        absent = {name: None for name in ("inner_bias", "outer_bias") if name in kernel.arg_names and not biases}
        options = refining_kernel.options(shape)
        assert compiled_without_spills(kernel, types, constants | absent, options, capability)


def test_a_program_of_the_backward_takes_a_part() -> None:
    for capability, d in itertools.product((8, 9), (16, 64, 65, 128)):
        shapes = refining_kernel.shapes_of(d, (capability, 0))
        assert shapes is not None
        assert shapes.backward.rows == Sizes(d, 1, 1, 1, True).part


def test_sizes_and_devices_that_they_do_not_take_have_none() -> None:
    taken = {
        cap: [d for d in (8, 16, 33, 64, 65, 128, 129) if refining._kernels_of_capability((cap, 0), d)]
        for cap in (7, 8, 9, 10)
    }
    assert taken == {7: [], 8: [16, 33, 64, 65, 128], 9: [16, 33, 64, 65, 128], 10: []}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [PAPER, Sizes(32, 85, 2, 4, False), Sizes(20, 53, 1, 3, True), Sizes(128, 341, 2, 2, True)]
)
def test_on_a_gpu_they_compute_what_is_written_out_and_are_taken(sizes: Sizes) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if refining_kernel.shapes_of(sizes.d, torch.cuda.get_device_capability(device)) is None:
        pytest.skip("the kernels do not take this size on this device")
    kernels = refining.kernels_for(device, torch.bfloat16, sizes)
    assert kernels is not None
    for rows in (1, 64, 14 * 64 * 3 + 5):
        refining.compare(kernels, *refining.example(device, torch.bfloat16, sizes, rows))
