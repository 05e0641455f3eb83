"""Count the kernels that Inductor schedules for a CUDA device, on a machine that has none.

A backend of torch.compile: it traces on the CPU, hands the graphs of forward and backward to Inductor as if their
tensors lay on a GPU of compute capability 9.0, and stops where Triton code would be written. Each node that is
scheduled there is a launch: a Triton kernel, a product of matrices or another operation of torch's own. The compiled
code then runs uncompiled, on the CPU. It looks into torch's internals, of 2.13.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import scheduler as inductor_scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

DEVICE = torch.device("cuda:0")
PROCESSORS, REGISTERS, THREADS = 132, 65_536, 2048
"""Of a GPU's multiprocessors: number, registers and threads of each. They decide how large sums are split."""
NO_LAUNCHES = ("MultiOutput", "NopKernelSchedulerNode")
"""What takes apart the tuple of another node, or only names memory."""


def counting_backend(ran: Callable[[str, Counter[str]], contextlib.AbstractContextManager[Any]]) -> Callable[..., Any]:
    """Return a backend for torch.compile whose graphs call `ran` each time they run.

    Args:
        ran: takes `forward` or `backward` and the launches of one run by kind; the graph runs inside what it returns.
    """

    def compiler(part: str) -> Callable[[fx.GraphModule, Sequence[Any]], Any]:
        def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            launches = scheduled(graph, inputs, is_backward=part == "backward")

            def run(*arguments: Any) -> Any:
                with ran(part, launches):
                    return graph.forward(*arguments)

            return make_boxed_func(run)

        return compile_graph

    def partition(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, **options)

    return aot_autograd(
        fw_compiler=compiler("forward"), bw_compiler=compiler("backward"), inference_compiler=compiler("forward"),
        partition_fn=partition, decompositions=select_decomp_table(),
    )  # fmt: skip


def scheduled(graph: fx.GraphModule, inputs: Sequence[Any], is_backward: bool) -> Counter[str]:
    """Return how many launches of each kind Inductor schedules for a graph of the CPU as one of a GPU."""
    mode = detect_fake_mode(inputs)
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": DEVICE}
    graph.recompile()
    with mode:
        on_gpu = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=DEVICE)
            if isinstance(each, Tensor)
            else each
            for each in inputs
        ]
    with _seeming_gpu(), torch.no_grad(), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        FakeTensorProp(graph, mode).propagate(*on_gpu)
        post_grad_passes(graph, False)
        lowering = GraphLowering(graph, example_inputs=on_gpu, is_backward=is_backward)
        with V.set_graph_handler(lowering), V.set_real_inputs(on_gpu):
            lowering.run(*on_gpu)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            names = Counter(map(_kind, lowering.scheduler.nodes))
    return Counter({name: count for name, count in names.items() if name not in NO_LAUNCHES})


def _kind(node: Any) -> str:
    if isinstance(node, inductor_scheduler.ExternKernelSchedulerNode):
        return str(getattr(node.node, "python_kernel_name", None) or type(node.node).__name__).rpartition("aten.")[2]
    return type(node).__name__ if isinstance(node, inductor_scheduler.NopKernelSchedulerNode) else "Triton kernel"


@contextlib.contextmanager
def _seeming_gpu() -> Iterator[None]:
    properties = types.SimpleNamespace(
        name="GPU", major=9, minor=0, multi_processor_count=PROCESSORS, total_memory=2**37, warp_size=32,
        regs_per_multiprocessor=REGISTERS, max_threads_per_multi_processor=THREADS, max_threads_per_block=1024,
        shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=227 * 1024, L2_cache_size=50 * 2**20,
        gcnArchName="",
    )  # fmt: skip
    hints = DeviceProperties("cuda", 0, PROCESSORS, 90, 9, REGISTERS, THREADS, 1024, 32)
    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.cuda.get_device_properties": lambda *_: properties,
            "torch.cuda.get_device_capability": lambda *_: (9, 0),
            "torch.cuda.current_device": lambda: 0,
            "torch._dynamo.device_interface.CudaInterface.Worker.get_device_properties": lambda *_: properties,
            "torch._inductor.runtime.hints.DeviceProperties.create": lambda *_: hints,
            "torch._inductor.scheduler.has_triton": lambda *_, **__: True,
        }.items():
            stack.enter_context(mock.patch(name, value))
        yield
