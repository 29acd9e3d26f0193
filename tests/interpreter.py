"""Triton's interpreter, as fast as it gets: it takes some milliseconds for a tile, whatever the tile's size."""

from fastnca.automaton import triton


def set_shapes(monkeypatch, tile=(16, 16), programs=3, groups=2):
    """Larger tiles, which take the interpreter hardly more time than small ones, and several of them per program."""
    if triton.interpreting():
        shapes = triton.LaunchShape(tile, 4), triton.LaunchShape(tile, 8)
        configuration = triton.Configuration(*shapes, programs, groups)
        monkeypatch.setattr(triton, "configuration", lambda *_: configuration)
        monkeypatch.setattr(triton, "MEMORY_BOUND_SHAPE", shapes[0])


def patch_once(monkeypatch):
    """Triton 3.9 patches its language anew for each call of a device function, which takes a third of the time: what it
    has done for the launch holds for our functions too."""
    if triton.interpreting():
        from triton.runtime.interpreter import InterpretedFunction

        original = InterpretedFunction.__call__

        def call(function, *args, **kwargs):
            if function.fn.__module__.startswith("fastnca.automaton."):
                return function.rewrite()(*args, **kwargs)
            return original(function, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "__call__", call)
