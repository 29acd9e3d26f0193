"""pytest -n 0 benchmarks: the speed of a rollout on small grids, in a minute. Quote benchmarks.speed.cpu instead."""

import pytest

from ..implementations import TITLES, Workload, build, why_not

STEPS = 4


@pytest.fixture(params=["eager", "cpu-fp32", "cpu-bf16"])
def name(request):
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"{TITLES[request.param]}: {reason}")
    return request.param


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("kind", ["forward", "training"])
def test_rollout(benchmark, name, kind, width):
    benchmark.group = f"{kind}, {STEPS} steps, W = {width}"
    work = getattr(build(name, Workload(width)), kind)(STEPS)
    result = benchmark.pedantic(work, rounds=7, warmup_rounds=2)
    assert all(tensor.isfinite().all() for tensor in result)
