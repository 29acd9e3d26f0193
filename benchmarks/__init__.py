"""What fastnca costs, beside what the same automaton costs elsewhere.

``python -m benchmarks.cpu`` writes the README's tables, ``python -m benchmarks.curves`` compares training curves, and
``pytest benchmarks`` is a quick look at the speed of one step. ``python -m benchmarks.gpu_report`` tells without a GPU
what the Triton kernels compile to, and ``python -m benchmarks.gpu_check`` checks and measures them on one.
"""
