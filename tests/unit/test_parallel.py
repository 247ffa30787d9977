"""Several items at once, in order."""

import os
import threading

import pytest

from bismooth.passes.parallel import ordered_map


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
