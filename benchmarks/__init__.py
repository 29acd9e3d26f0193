"""What fastnca costs and how well it learns, beside what the same automaton does elsewhere.

- ``speed``: how long a rollout takes. ``python -m benchmarks.speed.cpu`` writes the README's tables, and
  ``python -m benchmarks.speed.gpu`` checks and measures the Triton kernels on a GPU; ``pytest -n 0 benchmarks`` is a
  quick look.
- ``quality``: how well sounds are learned: ``recipes`` compares recipes, ``curves`` backends; ``pitches`` tells what
  grows at another pitch, and ``instruments`` how near a left-out note comes. What becomes of a grown sound is told by
  ``fastnca life``.
- ``morph``: what lies between the sounds of a space, beside a crossfade and other mixtures without a rule.
- ``compiled``: what the Triton kernels compile to, told without a GPU.
"""
