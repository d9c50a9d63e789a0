"""A training step recorded as a CUDA graph: its thousands of kernels are launched as one."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

WARMUP = 3  # calls before the recording, in which torch compiles, tunes and allocates

Values = dict[str, Tensor]
Step = Callable[..., tuple[Values, Values]]

log = logging.getLogger(__name__)


class GraphedUpdate:
    """`step` with the same results, replayed as a CUDA graph from the fourth call on.

    `step(*data)` takes dicts of tensors and returns two. Their shapes must stay the same, it must not wait
    for the GPU, and it must draw from `generators` only. If it cannot be recorded, it runs as before and the
    log gives the reason. An update on a GPU is limited by launches, not by computation (pytorch/rl #4216).
    """

    def __init__(self, step: Step, *generators: torch.Generator):
        self.step, self.generators = step, generators
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Values] = []  # the graph reads and writes the same memory each time
        self.outputs: tuple[Values, Values] = {}, {}

    def __call__(self, *data: Mapping[str, Tensor]) -> tuple[Values, Values]:
        self.calls += 1
        if self.calls <= WARMUP:
            return self._on_side_stream(*data)
        if self.calls == WARMUP + 1:
            self._record(*data)
        if self.graph is None:
            return self.step(*data)
        for inputs, values in zip(self.inputs, data, strict=True):
            for key, value in values.items():
                inputs[key].copy_(value)
        self.graph.replay()
        first, second = ({k: v.clone() for k, v in values.items()} for values in self.outputs)
        return first, second

    def _on_side_stream(self, *data: Mapping[str, Tensor]) -> tuple[Values, Values]:
        """Call the step without using the default stream, as the recording requires."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.step(*data)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self, *data: Mapping[str, Tensor]) -> None:
        self.inputs = [{key: value.clone() for key, value in values.items()} for values in data]
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        current, states = torch.cuda.current_stream(), [rng.get_state() for rng in self.generators]
        try:
            # The thread that draws the next batch may copy meanwhile: it must not spoil the recording.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.step(*self.inputs)
        except RuntimeError as error:
            log.warning("The update cannot be recorded as a CUDA graph and runs without: %s", error)
            # torch leaves its own stream set, and generators in the state of a recording (before 2.13).
            torch.cuda.set_stream(current)
            for generator, state in zip(self.generators, states, strict=True):
                if generator.device.type == "cuda":
                    fresh = torch.Generator(generator.device)
                    fresh.set_state(state)
                    generator.graphsafe_set_state(fresh.graphsafe_get_state())
            self.inputs = []
            return
        self.graph = graph
