"""All settings as commented files, made from the models and the docstrings of their fields.

TOML is what a job is given; YAML is the section of Dask's configuration that gives a site's own defaults.
"""

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
_DASK_HEAD: Final = """\
# A site's or user's own defaults for the settings of h2mv-dist, in Dask's configuration: take the # away from
# h2mv_dist: and from what is to change. Settings files and the command line come before what stands here,
# and so do variables such as DASK_H2MV_DIST__CLUSTER__WORKERS=4. Times such as "02:00:00" need quotes.
h2mv_dist:

  # fsspec's options for each protocol, {s3: {key: ..., secret: ..., endpoint_url: ...}}; they reach no
  # record, but every process that loads this configuration.
  storage_options: {}"""


def settings_template() -> str:
    """A settings file with every setting and its default, commented out; ``data.url`` is left to fill in."""
    tables = (table for name, field in Settings.model_fields.items() for table in _tables(name, field))
    return "\n\n".join((_HEAD, *tables, _SECRETS)) + "\n"


def dask_template() -> str:
    """The section ``h2mv_dist`` of Dask's configuration with every setting and its default."""
    sections = ("\n".join(_mapping(n, field, "  ")) for n, field in Settings.model_fields.items())
    return "\n\n".join((_DASK_HEAD, *sections)) + "\n"


def _mapping(name: str, field: FieldInfo, indent: str) -> Iterator[str]:
    """A section, with the sections inside it; what it would hold as comments where it is left out."""
    model = model_inside(field.annotation)
    assert model is not None
    given = field.annotation is model
    yield from _comment(f"{model.__doc__ or ''} {field.description or ''}", indent)
    yield f"{indent}{name}:" if given else f"{indent}{name}: {as_toml(_default(field))}"
    for key, inner in model.model_fields.items():
        if not given:
            about = f"{name}.{'NAME.' if get_origin(field.annotation) is dict else ''}{key}"
            yield from _comment(f"{about}: {_about(inner)}", f"{indent}  ")
        elif _is_table(inner):
            yield from _mapping(key, inner, f"{indent}  ")
        else:
            yield from _comment(_about(inner), f"{indent}  ")
            yield f"{indent}  {key}: {as_toml(_default(inner))}"


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
    yield from _comment(_about(field))
    default = _default(field)
    if field.is_required() and given:
        yield f'{key} = ""'
    else:
        yield f"#{key} =" + (f" {as_toml(default)}" if default is not None else "")


def _about(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    one_of = f" One of {', '.join(map(as_toml, choices))}." if choices else ""
    return (field.description or "") + one_of


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _comment(text: str, indent: str = "") -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        text.strip().replace("``", "`"), _WIDTH, initial_indent=prefix, subsequent_indent=prefix
    )
