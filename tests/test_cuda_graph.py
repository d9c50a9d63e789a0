"""GraphedUpdate with a fake CUDA graph that calls its step again; on a GPU, with a real one."""

import contextlib

import advice_helpers
import pytest
import torch
from test_models import DISCRETE, OBS, make_agent, make_batch
from torch.overrides import TorchFunctionMode

import cuda_graph
from agent import Dreamer
from lore_llm import synthetic
from tools import cuda_works


class FakeStream:
    def wait_stream(self, other):
        pass


class FakeGraph:
    """Recording calls the step once; each replay calls it again on the memory of the recording."""

    current = None

    def register_generator_state(self, generator):
        self.generator = generator

    def replay(self):
        first, second = self.step(*self.inputs)
        for kept, new in zip(self.outputs, (first, second), strict=True):
            for key, value in new.items():
                kept[key].copy_(value)


@pytest.fixture
def fake_cuda(monkeypatch):
    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        FakeGraph.current = graph
        yield

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)


def make_graphed(step):
    graphed = cuda_graph.GraphedUpdate(step, torch.Generator())
    record = graphed._record

    def recording(*data):
        record(*data)
        if graphed.graph:
            graphed.graph.step, graphed.graph.inputs = step, graphed.inputs
            graphed.graph.outputs = graphed.outputs

    graphed._record = recording
    return graphed


def test_every_call_gets_its_own_data_and_results(fake_cuda):
    graphed = make_graphed(lambda data: ({"double": 2 * data["x"]}, {"same": data["x"] + 0}))
    results = [graphed({"x": torch.tensor([float(i)])}) for i in range(8)]
    assert graphed.graph is not None and (graphed.graph.generator,) == graphed.generators
    assert [float(first["double"]) for first, _ in results] == [2.0 * i for i in range(8)]
    assert [float(second["same"]) for _, second in results] == [float(i) for i in range(8)]


def test_a_step_that_cannot_be_recorded_runs_without_a_graph(fake_cuda, monkeypatch, caplog):
    def refuse(graph, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = make_graphed(lambda data: ({"double": 2 * data["x"]}, {}))
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    results = [graphed({"x": torch.tensor(float(i))}) for i in range(6)]
    assert [float(first["double"]) for first, _ in results] == [2.0 * i for i in range(6)]
    assert caplog.text.count("cannot be recorded") == 1


@pytest.mark.skipif(not cuda_works(), reason="needs a CUDA GPU")
def test_a_recorded_update_gives_the_plain_numbers_on_a_gpu():
    config = make_agent("--compile", "False", "--precision", "float32").config
    agents = [Dreamer(OBS, DISCRETE, config, torch.device("cuda")) for _ in range(2)]
    agents[1].update = cuda_graph.GraphedUpdate(agents[1]._update, agents[1].rngs["train"])
    for seed in range(cuda_graph.WARMUP + 4):
        for agent in agents:
            agent.train(make_batch(agent, seed))
    assert agents[1].update.graph is not None
    plain, graphed = (agent.weights()["world_model"] for agent in agents)
    for key, value in plain.items():
        torch.testing.assert_close(graphed[key], value, rtol=1e-3, atol=1e-4)


# Functions that copy numbers to the GPU, or read them back.
HOST_FUNCTIONS = {
    *(torch.tensor, torch.as_tensor, torch.from_numpy, torch.nonzero, torch.masked_select),
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.nonzero),
    *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__),
}


class HostCalls(TorchFunctionMode):
    """Notes calls that cannot be recorded."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in HOST_FUNCTIONS:
            self.found.append(func.__name__)
        if func is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += ["mask" for i in index if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("paths", [(), ("prior",), ("synthetic",), ("options",), advice_helpers.PATHS])
def test_an_update_does_not_wait_for_the_host(paths):
    agent = advice_helpers.make_agent(paths)
    batch = {k: torch.from_numpy(v) for k, v in advice_helpers.make_batch(agent).items()}
    items = {}
    if "synthetic" in paths:
        items = advice_helpers.make_items(agent, synthetic.amount(agent.config))
    with HostCalls() as calls:
        agent._update(batch, items)
    assert calls.found == []
