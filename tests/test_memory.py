"""How much memory MLX may hold; the limit that is set on CUDA, played on the CPU, where MLX has one too."""

import mlx.core as mx
import pytest

from mlx_lm.tuner.preference import memory as module
from mlx_lm.tuner.preference.memory import MOST_HELD, SLACK, measure_step, trim_cache

MEGABYTE = 2**20


def limit():
    found = mx.set_memory_limit(0)
    mx.set_memory_limit(found)
    return found


@pytest.fixture
def usual():
    """The limit as it was before, to which it goes back after the test."""
    found = limit()
    yield found
    mx.set_memory_limit(found)


@pytest.fixture
def limits(monkeypatch, usual):
    """The limits that were in force at each evaluation, on CUDA's side of the branch."""
    monkeypatch.setattr(module, "on_cuda", lambda: True)
    found, evaluate = [], mx.eval

    def watched(work):
        found.append(limit())
        return evaluate(work)

    monkeypatch.setattr(mx, "eval", watched)
    return found


def step():
    """A step that takes eight megabytes on its way to a sum."""
    return mx.ones((2 * MEGABYTE,)).sum()


@pytest.mark.parametrize("share", [1, 3])
def test_the_largest_step_gets_what_a_measured_one_needs_in_proportion(limits, share):
    # Megabytes that lie there before, and that the step has no part in.
    kept = mx.zeros((4 * MEGABYTE,))
    kept[0].item()
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    measure_step(step(), 100, share * 100)
    assert limits == [0]  # nothing is held for longer than needed while it is measured
    need = share * 8 * MEGABYTE
    assert resting + need <= limit() <= resting + 2 * SLACK * need


def test_a_smaller_largest_step_gets_as_much_as_the_measured_one(limits):
    mx.reset_peak_memory()
    measure_step(step(), 100, 50)
    assert limit() >= 8 * MEGABYTE


def test_what_was_needed_before_is_not_taken_away(limits):
    mx.reset_peak_memory()
    before = mx.ones((64 * MEGABYTE // 4,)).sum()
    before.item()
    measure_step(step(), 100, 100)
    assert limit() >= 64 * MEGABYTE


def test_a_lower_limit_of_the_user_stays(limits):
    mx.set_memory_limit(5 * MEGABYTE)
    measure_step(step(), 100, 100)
    assert limit() == 5 * MEGABYTE


@pytest.mark.skipif(module.on_cuda(), reason="it is limited there")
def test_elsewhere_nothing_is_limited(usual):
    work = step()
    measure_step(work, 100, 1000)
    assert limit() == usual and work.item() == 2 * MEGABYTE


@pytest.mark.parametrize("held, kept", [(MOST_HELD - 0.01, True), (MOST_HELD + 0.01, False)])
def test_what_is_kept_for_later_arrays_is_given_back_where_it_is_much(held, kept, monkeypatch):
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0.5e9)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: held * 1e9 - 0.5e9)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 1e9)
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    trim_cache()
    assert (not cleared) == kept
