"""pytest benchmarks: the speed of a rollout on small grids, in about a minute. For figures to quote: benchmarks.cpu."""

import pytest

from .implementations import TITLES, Problem, build, why_not

NAMES = ["eager", "cpu-fp32", "cpu-bf16"]
WIDTHS = [8, 64]
STEPS = 4


@pytest.fixture(params=NAMES)
def name(request):
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"{TITLES[request.param]}: {reason}")
    return request.param


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["forward", "training"])
def test_rollout(benchmark, name, kind, width):
    benchmark.group = f"{kind}, {STEPS} steps, W = {width}"
    work = getattr(build(name, Problem(width)), kind)(STEPS)
    result = benchmark.pedantic(work, rounds=7, warmup_rounds=2)
    assert all(tensor.isfinite().all() for tensor in result)
