"""A training step recorded as a CUDA graph: its thousands of kernels are launched as one."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

WARMUP = 3  # calls before the recording, in which torch compiles, tunes and allocates

Values = dict[str, Tensor]
Step = Callable[[Mapping[str, Tensor]], tuple[Values, Values]]

log = logging.getLogger(__name__)


class GraphedUpdate:
    """`step` with the same results, launched by the GPU itself from the fourth call on.

    `step(data)` returns two dicts of tensors. Its shapes must stay the same, it must not wait for the GPU,
    and draw from `generator` only. Where it cannot be recorded, it is called as before and the log says why.
    Launching, not computing, is what limits a DreamerV3 update on a GPU (pytorch/rl #4216).
    """

    def __init__(self, step: Step, generator: torch.Generator):
        self.step, self.generator = step, generator
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Values = {}  # the graph reads and writes the same memory each time
        self.outputs: tuple[Values, Values] = {}, {}

    def __call__(self, data: Mapping[str, Tensor]) -> tuple[Values, Values]:
        self.calls += 1
        if self.calls <= WARMUP:
            return self._on_side_stream(data)
        if self.calls == WARMUP + 1:
            self._record(data)
        if self.graph is None:
            return self.step(data)
        for key, value in data.items():
            self.inputs[key].copy_(value)
        self.graph.replay()
        first, second = ({k: v.clone() for k, v in values.items()} for values in self.outputs)
        return first, second

    def _on_side_stream(self, data: Mapping[str, Tensor]) -> tuple[Values, Values]:
        """A call that leaves nothing on the default stream, as recording asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.step(data)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self, data: Mapping[str, Tensor]) -> None:
        self.inputs = {key: value.clone() for key, value in data.items()}
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        current, random = torch.cuda.current_stream(), self.generator.get_state()
        try:
            # The thread that draws the next batch may copy meanwhile: it must not spoil the recording.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.step(self.inputs)
        except RuntimeError as error:
            log.warning("The update cannot be recorded as a CUDA graph and runs without: %s", error)
            # torch leaves its own stream set, and the generator in the state of a recording (before 2.13).
            torch.cuda.set_stream(current)
            if self.generator.device.type == "cuda":
                fresh = torch.Generator(self.generator.device)
                fresh.set_state(random)
                self.generator.graphsafe_set_state(fresh.graphsafe_get_state())
            self.inputs = {}
            return
        self.graph = graph
