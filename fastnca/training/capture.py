"""CUDA graphs: work whose many small kernels a GPU does faster than Python can launch them."""

import torch


class Captured:
    """A function as a CUDA graph: a call copies its arguments to where the graph reads and replays its kernels.

    Args:
        function: takes tensors on a GPU. What it reads or changes beside them must stay where it is in memory, and it
            must not wait for the GPU. It runs once here, to compile what it launches.
        arguments: of that run.
        changed: the tensors that it changes in place; after that run they are put back.

    A call returns what the function does; the next call overwrites the tensors in it.
    """

    def __init__(self, function, arguments, changed=()):
        self.arguments = [argument.detach().clone() for argument in arguments]
        before = [tensor.detach().clone() for tensor in changed]  # capturing itself runs nothing
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*self.arguments)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, old in zip(changed, before):
            tensor.detach().copy_(old)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
            self.result = function(*self.arguments)

    def __call__(self, *arguments):
        for mine, given in zip(self.arguments, arguments, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.result
