"""Settings: frozen, validated when built, read from TOML, overridden on the command line.

One class a concern; a function takes the values it needs, never the whole tree. Storage options may hold
credentials: they are kept apart in :class:`StorageOptions`, which no dump, record or repr shows.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from h2mv_dist.errors import ConfigError, describe
from h2mv_dist.grid import Period
from h2mv_dist.variables import nearest


def _parse_period(value: object) -> object:
    return Period.parse(value) if isinstance(value, str) else value


PeriodSetting = Annotated[Period, BeforeValidator(_parse_period), PlainSerializer(str, return_type=str)]


class StorageOptions(Mapping[str, Mapping[str, object]]):
    """fsspec options a protocol (``{"s3": {"key": ...}}``) whose values never appear in text.

    >>> StorageOptions({"s3": {"secret": "hush"}})
    StorageOptions(s3: ***)
    """

    def __init__(self, options: Mapping[str, Mapping[str, object]] | None = None) -> None:
        self._options = {protocol: dict(values) for protocol, values in (options or {}).items()}

    def __getitem__(self, protocol: str) -> Mapping[str, object]:
        return self._options[protocol]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

    def __repr__(self) -> str:
        return f"StorageOptions({', '.join(f'{protocol}: ***' for protocol in self)})"

    def reveal(self) -> dict[str, dict[str, object]]:
        """The plain options, for a message to a worker; never write the result anywhere."""
        return {protocol: dict(values) for protocol, values in self.items()}


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )


class VariableSource(_Settings):
    """Where a CF data set keeps one variable."""

    name: str | None = None
    """Array name in the store; the variable's own name if left out."""
    url: str | None = None
    """Store, if it is not the data set's own."""
    group: str | None = None
    """Group inside the store."""
    units: str | None = None
    """Units, for an array that does not say them itself."""


class DataSettings(_Settings):
    """Which data set is read, and how it is laid out."""

    url: str
    """Any fsspec URL of a Zarr store."""
    layout: Literal["published", "cf"] = "published"
    variables: dict[str, VariableSource] = Field(default_factory=dict)
    """CF layout: variable -> where it is. Variables left out keep their own name."""
    static: tuple[str, ...] = ("static",)
    """CF layout: the static features, one array each, or one array with a feature axis."""
    mask: VariableSource | None = None
    """CF layout: the land mask (non-zero = land); without it, land is where all static are finite."""
    period: PeriodSetting | None = None
    """Days to use; all days of the forcing if left out."""


class Assignment(_Settings):
    """One line of an explicit fold: these cells have this role in these periods."""

    role: Literal["train", "validation", "test"]
    cells: tuple[int, ...] | None = None
    """Positions among the land cells, row-major; all if left out."""
    periods: tuple[PeriodSetting, ...] | None = None
    """All days if left out."""


class FoldSettings(_Settings):
    """How cells and periods are divided into training, validation and test."""

    n_folds: int = Field(10, ge=1)
    block: int = Field(5, ge=1)
    """Edge of a spatial block, in cells."""
    seed: int = Field(1, ge=0)
    explicit: tuple[tuple[Assignment, ...], ...] | None = None
    """One list of assignments a fold, instead of spatial blocks."""

    @property
    def count(self) -> int:
        """Number of folds."""
        return self.n_folds if self.explicit is None else len(self.explicit)


class ModelSettings(_Settings):
    """Which model, and the sizes of its networks."""

    name: str = "h2mv"
    hidden: int = Field(100, ge=1)
    encoder: int = Field(150, ge=1)
    condensed: int = Field(12, ge=1)


class TrainingSettings(_Settings):
    """How folds are trained."""

    folds: tuple[int, ...] | None = None
    """Folds to train; all if left out."""
    ranks: int = Field(1, ge=1)
    """Processes a fold is trained with."""
    epochs: int = Field(5000, ge=1)
    patience: int = Field(30, ge=1)
    batch_size: int = Field(256, ge=1)
    """Cells a step, over all ranks."""
    learning_rate: float = Field(0.01, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_value: float = Field(0.5, gt=0)
    spinup_days: int | None = Field(None, ge=0)
    """Days run before each simulation to fill the stores; the whole period if left out."""
    targets: tuple[str, ...] | None = None
    """Observed variables to train on; all of the model's if left out."""
    scaler: Literal["fit", "published"] = "fit"
    seed: int = Field(0, ge=0)
    threads: int = Field(1, ge=1)
    """Torch threads of each rank on a CPU."""
    attempts: int = Field(3, ge=1)
    """How often a fold is started before it counts as failed."""
    cache: str | None = None
    """Folder of each host where cells are staged; the user's cache folder if left out."""

    def identity(self) -> dict[str, Any]:
        """The settings that change numbers: without stopping limits and places."""
        return self.model_dump(mode="json", exclude={"folds", "epochs", "patience", "attempts", "cache"})


class InferenceSettings(_Settings):
    """What an output cube holds, and how it is cut into tiles, shards and chunks."""

    period: PeriodSetting | None = None
    """Days to simulate; all days of the forcing if left out."""
    outputs: tuple[str, ...] | None = None
    """Variables to write; all if left out."""
    members: Literal["spread", "all"] = "spread"
    """``spread``: mean and standard deviation over folds; ``all``: a member axis."""
    folds: tuple[int, ...] | None = None
    """Folds to run; every trained one if left out."""
    spinup_days: int | None = Field(None, ge=0)
    """Days run to fill the stores, from the period's start; the whole period if left out."""
    baseline: PeriodSetting | None = None
    """Days whose mean anomalies refer to; the whole period if left out."""
    tile: tuple[int, ...] = (20, 20)
    """Cells of a tile along each spatial axis; a multiple of the shard."""
    shard: tuple[int, ...] = (20, 20)
    """Cells of a shard along each spatial axis; a multiple of the chunk."""
    chunk: tuple[int, ...] = (10, 10)
    """Cells of a chunk along each spatial axis."""
    shard_days: int = Field(360, ge=1)
    """Days of a shard, and of one time block in memory."""
    chunk_days: int = Field(120, ge=1)
    threads: int = Field(1, ge=1)
    """Torch threads of each worker."""
    attempts: int = Field(3, ge=1)
    overwrite: bool = False
    """Replace an existing cube that holds something else."""

    @model_validator(mode="after")
    def _shards_hold_whole_chunks(self) -> Self:
        pairs = [("shard_days", self.shard_days, self.chunk_days)]
        pairs += [("shard", s, c) for s, c in zip(self.shard, self.chunk, strict=True)]
        for name, outer, inner in pairs:
            if outer % inner:
                raise ValueError(f"{name} ({outer}) must be a multiple of its chunk ({inner})")
        return self


class ClusterSettings(_Settings):
    """Where work runs."""

    kind: Literal["local", "cuda", "address"] = "local"
    workers: int = Field(2, ge=1)
    address: str | None = None
    """Running scheduler, for ``kind = "address"``."""
    memory_limit: str = "auto"

    @model_validator(mode="after")
    def _address_needs_one(self) -> Self:
        if (self.kind == "address") != (self.address is not None):
            raise ValueError('kind = "address" and an address go together')
        return self


class Settings(_Settings):
    """Everything a job needs to know."""

    data: DataSettings
    folds: FoldSettings = FoldSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    inference: InferenceSettings = InferenceSettings()
    cluster: ClusterSettings = ClusterSettings()


_SECRET_TABLE: Final = "storage_options"


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Settings, StorageOptions]:
    """Read settings from a TOML file and apply ``section.key=value`` overrides.

    The file's table ``[storage_options.PROTOCOL]`` is returned apart, so that it cannot reach a record.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or not valid.
    """
    tree = _read_toml(path) if path is not None else {}
    for override in overrides:
        _apply(tree, override)
    secrets = StorageOptions(tree.pop(_SECRET_TABLE, None))
    return validate(tree, where=str(path or "command line")), secrets


def validate(tree: Mapping[str, Any], where: str) -> Settings:
    """Build settings from a plain tree.

    Raises:
        ConfigError: naming each wrong setting and, for an unknown one, the nearest valid name.
    """
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"settings in {where} are not valid:\n  " + "\n  ".join(lines)) from None


def to_json(settings: Settings) -> dict[str, Any]:
    """Settings as a JSON-able tree that :func:`validate` reads back."""
    tree: dict[str, Any] = settings.model_dump(mode="json")
    return tree


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error), "correct that line") from error


def _unreadable(path: str | Path, reason: str, fix: str) -> ConfigError:
    return ConfigError(
        describe(
            "cannot read the settings",
            where=str(path),
            expected='a TOML file with at least [data] and url = "..."',
            actual=reason,
            fix=f"{fix}; `h2mv-dist demo` writes a settings.toml that can be copied",
        )
    )


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in the tree; the value is TOML, or a plain string."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not section.key=value")
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown setting; {nearest(location[-1], _valid_names(location[:-1]))}"
    return f"{name}: {problem['msg']}"


def _valid_names(sections: Sequence[str]) -> tuple[str, ...]:
    model: type[BaseModel] = Settings
    for section in sections:
        annotation = model.model_fields[section].annotation if section in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    names = tuple(model.model_fields)
    return (*names, _SECRET_TABLE) if model is Settings else names


def canonical_json(record: object) -> str:
    """JSON with one spelling for one value, for checksums and comparable records.

    >>> canonical_json({"b": 1, "a": [1.5]})
    '{"a":[1.5],"b":1}'
    """
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
