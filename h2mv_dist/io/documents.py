"""Records that somebody stored as JSON: plain values, refused unless they are what they should be."""

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from h2mv_dist.errors import StoreError, describe
from h2mv_dist.io.stores import displayed

_T = TypeVar("_T")


def parsed(data: bytes, url: str) -> dict[str, Any]:
    """A stored JSON object.

    Args:
        data: the bytes.
        url: where they are from, for messages.

    Raises:
        StoreError: they are something else.
    """
    try:
        found = json.loads(data)
    # nested deeper than Python's reader goes, too
    except (ValueError, RecursionError) as error:
        raise _damaged(url, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(url, f"a JSON {type(found).__name__}")
    return found


def checked(kind: TypeAdapter[_T], data: bytes, url: str) -> _T:
    """A stored JSON object of one kind, with values of the right types.

    Raises:
        StoreError: it is something else.
    """
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise _damaged(url, f"{name}: {first['msg']}" if name else first["msg"]) from None


def _damaged(url: str, reason: str) -> StoreError:
    return StoreError(
        describe(
            "a record is damaged, or not one of h2mv-dist",
            where=displayed(url),
            expected="the JSON that was written there",
            actual=reason,
            fix="restore it from a copy, or delete it if what it speaks of is to be done again",
        )
    )
