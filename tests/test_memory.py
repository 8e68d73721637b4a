"""MLX's memory limit while steps are handed to a GPU of NVIDIA's, played on the CPU, where MLX has one too."""

import mlx.core as mx
import pytest

from mlx_lm.tuner.preference import memory as module
from mlx_lm.tuner.preference.memory import SLACK, Dispatch, with_limit

MEGABYTE = 2**20


@pytest.fixture
def limits(monkeypatch):
    """The limits that were in force at each evaluation, as on CUDA."""
    monkeypatch.setattr(module, "on_cuda", lambda: True)
    found = []

    def watched(function):
        def evaluate(work):
            limit = mx.set_memory_limit(0)
            mx.set_memory_limit(limit)
            found.append(limit)
            return function(work)

        return evaluate

    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, watched(getattr(mx, name)))
    return found


def usual_limit():
    limit = mx.set_memory_limit(0)
    mx.set_memory_limit(limit)
    return limit


def step(kept):
    """A step that takes eight megabytes on its way to a sum."""
    return (mx.ones((2 * MEGABYTE,)) + kept).sum()


def test_steps_are_given_what_the_first_update_needed(limits):
    usual, dispatch, kept = usual_limit(), Dispatch(), mx.zeros((1,))
    steps = [(100, False, False), (100, True, False), (50, True, False), (200, False, False), (100, True, True)]
    for tokens, update, compiled in steps:
        work = step(kept)
        dispatch(work, tokens, update, compiled)
        assert usual_limit() == usual
        mx.synchronize()
    assert limits[0] == usual and limits[1] == 0
    resting, need, _ = dispatch._needs[False]
    assert 8 * MEGABYTE <= need < 20 * MEGABYTE
    # A smaller batch has as much, a larger one in proportion to its tokens.
    assert limits[2] == int(resting + SLACK * need)
    assert limits[3] == int(resting + SLACK * 2 * need)
    # Compiled steps are measured apart.
    assert limits[4] == 0 and dispatch._needs[True][2] == 100


def test_the_peak_is_that_of_all_that_has_run(limits):
    mx.reset_peak_memory()
    mx.eval(mx.ones((16 * MEGABYTE,)))
    peak, dispatch = mx.get_peak_memory(), Dispatch()
    dispatch(step(mx.zeros((1,))), 100, True, False)
    assert mx.get_peak_memory() < peak == dispatch.peak_memory()


def test_elsewhere_nothing_is_limited(limits, monkeypatch):
    monkeypatch.setattr(module, "on_cuda", lambda: False)
    dispatch = Dispatch()
    for _ in range(3):
        dispatch(step(mx.zeros((1,))), 100, True, False)
    assert limits == [usual_limit()] * 3


def test_a_lower_limit_of_the_user_stays():
    usual = mx.set_memory_limit(50 * MEGABYTE)
    try:
        assert with_limit(100 * MEGABYTE, usual_limit) == 50 * MEGABYTE
        assert with_limit(10 * MEGABYTE, usual_limit) == 10 * MEGABYTE
        with pytest.raises(ZeroDivisionError):
            with_limit(10 * MEGABYTE, lambda: 1 / 0)
        assert usual_limit() == 50 * MEGABYTE
    finally:
        mx.set_memory_limit(usual)
