"""What Python searches for garbage: not what is loaded once."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress

import pytest

from h2mv_dist.jobs.memory import loading, set_apart_what_is_loaded


class Knot:
    """Refers to itself, so that only a search finds out that nobody else does."""

    def __init__(self) -> None:
        self.knot = self


@pytest.fixture(autouse=True)
def searched_as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_garbage_is_not_set_apart() -> None:
    garbage, kept = weakref.ref(Knot()), Knot()
    set_apart_what_is_loaded()
    assert garbage() is None
    assert gc.is_tracked(kept)
    assert all(other is not kept for other in gc.get_objects())
    assert gc.get_freeze_count() > 0


def test_what_became_garbage_since_goes_the_next_time() -> None:
    knot = Knot()
    garbage = weakref.ref(knot)
    set_apart_what_is_loaded()
    del knot
    gc.collect()
    assert garbage() is not None
    set_apart_what_is_loaded()
    assert garbage() is None


def test_garbage_is_searched_for_again_after_loading() -> None:
    with suppress(ImportError), loading():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
