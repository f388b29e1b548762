"""All settings as a commented TOML file, made from the models and the docstrings of their fields."""

import textwrap
from collections.abc import Iterator
from types import NoneType
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from h2mv_dist.config import Settings, as_toml, model_inside

_WIDTH: Final = 110
_HEAD: Final = """\
# All settings of h2mv-dist. Lines such as "#ranks = 1" show the defaults; take the # away to change one.
# Only data.url is needed. What the command line says (--set section.key=value) comes last."""
_SECRETS: Final = """\
# fsspec's options for each protocol (s3, gs, http ...). They never reach a record; they may as well stand in
# Dask's configuration (h2mv_dist.storage-options) or in fsspec's environment variables (FSSPEC_S3_KEY ...).
#[storage_options.s3]
#key =
#secret =
#endpoint_url ="""


def settings_template() -> str:
    """A settings file with every setting and its default, commented out; ``data.url`` is left to fill in."""
    tables = (table for name, field in Settings.model_fields.items() for table in _tables(name, field))
    return "\n\n".join((_HEAD, *tables, _SECRETS)) + "\n"


def _tables(name: str, field: FieldInfo) -> Iterator[str]:
    """The table of a section, then those of the sections inside it."""
    model = model_inside(field.annotation)
    assert model is not None
    given = field.annotation is model
    named = f"{name}.NAME" if get_origin(field.annotation) is dict else name
    fields = model.model_fields.items()
    about = _comment(f"{model.__doc__ or ''} {field.description or ''}")
    values = (line for key, inner in fields if not _is_table(inner) for line in _value(key, inner, given))
    yield "\n".join((*about, f"[{named}]" if given else f"#[{named}]", *values))
    for key, inner in fields:
        if _is_table(inner):
            yield from _tables(f"{named}.{key}", inner)


def _is_table(field: FieldInfo) -> bool:
    """Whether a setting has a TOML table of its own: a model, perhaps a model, or models by name."""
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind not in (NoneType, str)]
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def _value(key: str, field: FieldInfo, given: bool) -> Iterator[str]:
    """One setting; without a value if it has no default, but to fill in if it is needed."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    one_of = f" One of {', '.join(map(as_toml, choices))}." if choices else ""
    yield from _comment((field.description or "") + one_of)
    default: Any = None if field.is_required() else field.get_default(call_default_factory=True)
    if field.is_required() and given:
        yield f'{key} = ""'
    else:
        yield f"#{key} =" + (f" {as_toml(default)}" if default is not None else "")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text.strip().replace("``", "`"), _WIDTH, initial_indent="# ", subsequent_indent="# ")
