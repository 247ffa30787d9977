"""Several items at once, in order."""

import os
import threading
from importlib import import_module
from typing import Any

import pytest

from bismooth.passes.parallel import ordered_map

threadpoolctl: Any = import_module("threadpoolctl")


def test_results_come_in_the_order_of_the_items() -> None:
    released = threading.Event()

    def work(item: int) -> int:
        if item == 0 and (os.cpu_count() or 1) > 1:
            assert released.wait(10), "item 1 waited for item 0"
        released.set()
        return -item

    assert list(ordered_map(work, range(20))) == [-item for item in range(20)]


def test_an_error_reaches_the_caller_and_stops_the_rest() -> None:
    done: list[int] = []

    def work(item: int) -> int:
        if item == 0:
            raise ValueError("broken")
        threading.Event().wait(0.01)
        done.append(item)
        return item

    with pytest.raises(ValueError, match="broken"):
        list(ordered_map(work, range(1000)))
    assert len(done) < 100


def test_a_caller_that_stops_stops_the_rest() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        threading.Event().wait(0.01)
        done.append(item)

    for _ in ordered_map(work, range(1000)):
        break
    assert len(done) < 100


def test_matrix_products_have_all_cores_again_afterwards() -> None:
    def cores() -> set[int]:
        return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}

    with threadpoolctl.threadpool_limits(3, "blas"):
        before = cores()
        first, second = ordered_map(abs, [1, 2, 3]), ordered_map(abs, [4, 5, 6])
        assert next(first) == 1
        assert next(second) == 4
        assert cores() == {1}
        assert list(first) == [2, 3]
        assert cores() == {1}, "the second one goes on"
        assert list(second) == [5, 6]
        assert cores() == before
