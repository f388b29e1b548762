"""A site's own defaults: the section ``h2mv_dist`` of Dask's configuration, files and environment alike.

What is said on the command line comes first, then the settings file, then what stands here, then built-in
defaults, which ``h2mv_dist.yaml`` documents and registers with Dask.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

import dask
import yaml

from h2mv_dist import config
from h2mv_dist.config import SITE, ClusterSettings, Settings, SettingsLike, StorageOptions
from h2mv_dist.errors import ConfigError, describe
from h2mv_dist.jobs.cluster import known_options

DEFAULTS: Final = resources.files("h2mv_dist").joinpath("h2mv_dist.yaml")
_DEFAULTS: Final[Mapping[str, Any]] = yaml.safe_load(DEFAULTS.read_text())
_APART: Final = "storage_options"
_NAMED_BY_USERS: Final = frozenset({"values", "variables", "stamps"})
"""Tables whose keys are names of variables and settings, which are left as they are."""

dask.config.update_defaults(dict(_DEFAULTS))


def load(path: SettingsLike | None, overrides: Sequence[str] = ()) -> tuple[Settings, StorageOptions]:
    """Read settings over those of Dask's configuration; see :func:`h2mv_dist.config.load`.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or not valid.
    """
    settings, secrets = config.load(path, overrides, site_settings())
    return settings, known_options(secrets)


def load_cluster(path: SettingsLike | None, overrides: Sequence[str] = ()) -> ClusterSettings:
    """Read the cluster section over Dask's configuration; see :func:`h2mv_dist.config.load_cluster`.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or not valid.
    """
    return config.load_cluster(path, overrides, site_settings())


def site_settings() -> dict[str, Any]:
    """What Dask's configuration says of settings, but for what the built-in defaults say, too.

    A default that counted as chosen would keep ``inference.preset`` from setting chunks.

    Raises:
        ConfigError: it is no table of settings.
    """
    given = dask.config.get(SITE, {})
    if not isinstance(given, Mapping):
        raise ConfigError(
            describe(
                "Dask's configuration holds no table of settings",
                where=SITE,
                expected="a table, such as {cluster: {workers: 4}}",
                actual=type(given).__name__,
                fix="correct it; dask config find h2mv_dist says where it is from",
            )
        )
    named = _with_our_names(given)
    named.pop(_APART, None)
    return _differing(named, _DEFAULTS[SITE])


def leave_template() -> None:
    """Put the commented defaults into the user's folder of Dask's configuration, unless they are there."""
    with resources.as_file(DEFAULTS) as file:
        dask.config.ensure_file(source=str(file), comment=True)


def _with_our_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Names with underscores, where Dask takes hyphens as well."""
    return {
        (ours := str(name).replace("-", "_")): _with_our_names(value)
        if isinstance(value, Mapping) and ours not in (*_NAMED_BY_USERS, _APART)
        else value
        for name, value in tree.items()
    }


def _differing(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        name: _differing(value, defaults[name])
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping)
        else value
        for name, value in tree.items()
    }
    return {name: value for name, value in found.items() if value not in ({}, defaults.get(name, ...))}
