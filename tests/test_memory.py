"""How much memory MLX may hold; the limit that is set on CUDA, played on the CPU, where MLX has one too."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_lm.tuner.preference import driver_pool as driver_pool_module
from mlx_lm.tuner.preference import memory as module
from mlx_lm.tuner.preference.driver_pool import DriverPool
from mlx_lm.tuner.preference.memory import (
    EVERY,
    MOST_HELD,
    Need,
    bounded_memory,
    held_memory,
    one_behind,
    peak_memory,
    trim_cache,
)

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
        if work is not None and work.shape == ():  # a step's sum, and not what the device is waited for with
            found.append(limit())
        return evaluate(work)

    monkeypatch.setattr(mx, "eval", watched)
    return found


def step():
    """A step that takes eight megabytes on its way to a sum."""
    return mx.ones((2 * MEGABYTE,)).sum()


@pytest.mark.parametrize("growth", [1.0, 3.0, 0.5])
def test_what_the_first_evaluation_needs_is_the_limit_of_the_others(limits, usual, growth):
    # Megabytes that lie there before, and that the step has no part in.
    kept = mx.zeros((4 * MEGABYTE,))
    kept[0].item()
    resting = mx.get_active_memory()
    with bounded_memory() as evaluate:
        evaluate(step(), growth)
        assert limits == [0, limit()]  # nothing is held for longer than needed while it is measured
        need = max(growth, 1.0) * 8 * MEGABYTE
        assert resting + need <= limit() <= resting + 2 * need
        found = limit()
        evaluate(step(), 100.0)
        assert limits[2:] == [found]
    assert limit() == usual


def test_what_evaluations_of_a_kind_need_is_measured_once(limits):
    need = Need()
    for _ in range(2):
        with bounded_memory(need) as evaluate:
            evaluate(step())
            assert mx.get_active_memory() + 8 * MEGABYTE <= limit() <= mx.get_active_memory() + 2 * 8 * MEGABYTE
    assert limits.count(0) == 1


def test_arrays_are_handed_out_once_the_next_ones_are_under_way():
    told = []

    def works():
        for i in range(3):
            told.append(("made", i))
            yield mx.full((2,), i), i

    def evaluate(work, wait):
        told.append(("given", int(work[0].item())))
        assert not wait

    for array, i in one_behind(evaluate, works()):
        assert array.tolist() == [i, i]
        told.append(("had", i))
    first, *between, last = told
    assert (first, last) == (("made", 0), ("had", 2))
    assert between == [
        ("given", 0),
        ("made", 1),
        ("given", 1),
        ("had", 0),
        ("made", 2),
        ("given", 2),
        ("had", 1),
    ]
    assert list(one_behind(evaluate, [])) == []


def test_the_peak_is_of_the_time_before_the_measurement_too(limits):
    before = mx.ones((64 * MEGABYTE // 4,)).sum()
    before.item()
    with bounded_memory() as evaluate:
        evaluate(step())
    assert mx.get_peak_memory() < 64 * MEGABYTE <= peak_memory()


def test_a_lower_limit_of_the_user_stays(limits):
    mx.set_memory_limit(5 * MEGABYTE)
    with bounded_memory() as evaluate:
        evaluate(step())
        assert limit() == 5 * MEGABYTE
    assert limit() == 5 * MEGABYTE


@pytest.mark.skipif(module.on_cuda(), reason="it is limited there")
def test_elsewhere_nothing_is_limited(usual):
    work = step()
    with bounded_memory() as evaluate:
        evaluate(work, 10.0)
        assert limit() == usual and work.item() == 2 * MEGABYTE


@pytest.mark.parametrize(
    "threshold, held, given_back",
    [(10**6, 0.6, True), (10**12, 2.0, False), (0, MOST_HELD - 0.01, False), (0, MOST_HELD + 0.01, True)],
)
def test_what_is_kept_is_given_back_beyond_a_threshold_or_where_it_is_much(threshold, held, given_back, monkeypatch):
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0.5e9)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: held * 1e9 - 0.5e9)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 1e9)
    monkeypatch.setattr(module, "_earlier_peak", 0)
    monkeypatch.setattr(module, "on_cuda", lambda: False)
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("the device is waited for on CUDA alone"))
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    trim_cache(threshold)
    assert bool(cleared) == given_back


def test_on_cuda_a_threshold_of_the_users_is_kept_once_the_device_is_done(monkeypatch):
    monkeypatch.setattr(module, "on_cuda", lambda: True)
    done = []
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1001)
    monkeypatch.setattr(mx, "eval", lambda *_: done.append("waited"))
    monkeypatch.setattr(mx, "clear_cache", lambda: done.append("cleared"))
    trim_cache(1001)
    assert done == []
    trim_cache(1000)
    assert done == ["waited", "cleared"]


@pytest.fixture
def pool(monkeypatch, usual):
    """A driver's pool that this process takes to be MLX's."""
    found = SimpleNamespace(reserved=0, kept=7, trims=[])
    found.trim = found.trims.append
    monkeypatch.setattr(module, "driver_pool", lambda: found)
    return found


@pytest.mark.parametrize("pieces", [False, True])
def test_what_the_driver_keeps_is_given_back_from_time_to_time_where_it_is_much(pieces, pool, monkeypatch):
    """Unless it lies free in the pool, what MLX keeps goes there, and nothing is waited for."""
    monkeypatch.setattr(module, "_calls", 0)
    monkeypatch.setattr(module, "_earlier_peak", 0)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 10**12)
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("the device is waited for"))
    monkeypatch.setattr(mx, "clear_cache", lambda: pytest.fail("the pool is emptied"))
    most, limits = MOST_HELD * 10**12, []
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: limits.append(limit) or 5)
    monkeypatch.setattr(mx, "async_eval", lambda _: limits.append("array"))
    if not pieces:
        pool.trim = lambda wanted: pool.trims.append(wanted) or setattr(pool, "reserved", wanted)
    for pool.reserved in (most, most + 1):
        for _ in range(2 * EVERY):
            trim_cache()
        assert held_memory() >= pool.reserved
    assert pool.trims == [most] * (2 if pieces else 1)
    assert limits == [0, "array", 5] * 2 * pieces


def test_the_driver_keeps_what_a_step_needs_until_the_run_is_over(limits, pool):
    with bounded_memory() as evaluate:
        assert pool.kept == 7
        evaluate(step())
        assert pool.kept == MOST_HELD * limit()
        pool.kept = 10**15  # as of a context around another
        with bounded_memory() as inner:
            inner(step())
            assert pool.kept == 10**15
        assert pool.kept == 10**15
    assert pool.kept == 7


def test_the_driver_keeps_no_more_than_mlx_may_take(limits, pool):
    mx.set_memory_limit(int(1.1 * (mx.get_active_memory() + 8 * MEGABYTE)))
    most = limit()
    with bounded_memory() as evaluate:
        evaluate(step())
        assert limit() <= pool.kept == most < MOST_HELD * limit()


class Driver:
    """What of CUDA's driver `DriverPool` calls, of a pool that keeps nothing; `fails` answers with an error."""

    def __init__(self, fails=None):
        self.values, self.trimmed, self.fails = {4: 0, 5: 3000}, None, fails

    def __getattr__(self, name):
        return lambda *arguments: 801 if name == self.fails else getattr(self, "_" + name)(*arguments)

    def _cuCtxGetDevice(self, device):
        device._obj.value = 3
        return 0

    def _cuDeviceGetDefaultMemPool(self, pool, device):
        pool._obj.value = 100 + device.value
        return 0

    def _cuMemPoolGetAttribute(self, pool, attribute, value):
        assert pool.value == 103
        value._obj.value = self.values[attribute]
        return 0

    def _cuMemPoolSetAttribute(self, pool, attribute, value):
        assert pool.value == 103
        self.values[attribute] = value._obj.value
        return 0

    def _cuMemPoolTrimTo(self, pool, most):
        assert pool.value == 103
        self.trimmed = most.value
        return 0


def test_the_drivers_pool_is_read_and_set():
    driver = Driver()
    pool = DriverPool(driver)
    assert (pool.reserved, pool.kept) == (3000, 0)
    pool.kept = 1.3 * 2**40
    assert pool.kept == int(1.3 * 2**40)
    pool.trim(2000.5)
    assert driver.trimmed == 2000
    with pytest.raises(OSError, match="801"):
        DriverPool(Driver(fails="cuMemPoolGetAttribute")).reserved  # noqa: B018


@pytest.mark.parametrize("fails", ["cuCtxGetDevice", "cuDeviceGetDefaultMemPool", "cuMemPoolSetAttribute", None])
def test_a_device_without_such_a_pool_has_none(fails, monkeypatch):
    monkeypatch.setattr(driver_pool_module, "on_cuda", lambda: True)
    monkeypatch.setattr(driver_pool_module.ctypes, "CDLL", lambda name: Driver(fails))
    driver_pool_module.driver_pool.cache_clear()
    try:
        assert (driver_pool_module.driver_pool() is None) == (fails is not None)
    finally:
        driver_pool_module.driver_pool.cache_clear()


def test_the_most_that_was_held_is_kept_after_it_was_given_back(monkeypatch):
    monkeypatch.setattr(module, "_most_held", 0)
    monkeypatch.setattr(module, "_earlier_peak", 0)
    mx.reset_peak_memory()
    mx.eval(mx.zeros(2**22, mx.uint8))
    held = mx.get_active_memory() + mx.get_cache_memory()
    trim_cache(1)
    assert held_memory() == max(held, mx.get_peak_memory()) > mx.get_active_memory() + mx.get_cache_memory()


def test_where_there_is_nothing_to_evaluate_nothing_is_measured(limits):
    need = Need()
    with bounded_memory(need) as evaluate:
        assert [i for _, i in one_behind(evaluate, [(None, 0), (step(), 1), (None, 2)])] == [0, 1, 2]
    assert need.taken >= 8 * MEGABYTE
