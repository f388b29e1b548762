"""Settings: frozen, validated when built, read from TOML, overridden on the command line.

One class a concern; a function takes the values it needs, never the whole tree. Storage options may hold
credentials: they are kept apart in :class:`StorageOptions`, which no dump, record or repr shows.
"""

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    ValidationError,
    model_validator,
)

from h2mv_dist.errors import ConfigError, describe
from h2mv_dist.grid import Period
from h2mv_dist.variables import nearest

_PASSWORD: Final = re.compile(r"(:/{1,2})(?!/)[^/:]*:(?!\d+/).*@")
"""``://user:password@``, also where the password holds a slash; not ``://host:port/``."""
_ONE_PROCESS: Final = (
    "expected a place that every process reaches; given memory://, which worker processes do not share; "
    "use a folder, or a URL such as s3://bucket/name"
)


def place(text: str) -> str:
    """A path or URL as it reads from any folder: paths become absolute, URLs stay URLs.

    >>> place("s3://bucket/job/"), place("/data/old/../job/"), place("file:///data//job")
    ('s3://bucket/job', '/data/job', 'file:///data/job')

    Raises:
        ConfigError: it is empty, or holds a password.
    """
    if not text.strip():
        raise ConfigError(
            "expected a path or URL; given an empty one; say where it is: /data/x, s3://bucket/x"
        )
    if not text.isprintable():
        raise ConfigError(
            f"expected a path or URL of printable characters; given {as_toml(text)}; take the others out"
        )
    if _PASSWORD.search(text):
        raise ConfigError(
            "expected a URL without a password; given one with a password, which records would show; "
            "give user name and password as storage options, in [storage_options.PROTOCOL]"
        )
    protocol, is_url, path = text.partition("://")
    if not is_url:
        return os.path.abspath(os.path.expanduser(text))
    return f"file://{os.path.abspath(path)}" if protocol == "file" else text.rstrip("/")


def shared_place(text: str) -> str:
    """A :func:`place` that other processes can reach.

    Raises:
        ConfigError: as for :func:`place`, or it is the memory of one process.
    """
    if _in_memory(text):
        raise ConfigError(_ONE_PROCESS)
    return place(text)


def _in_memory(text: str) -> bool:
    return "memory://" in text


def _local_place(text: str) -> str:
    if "://" in text:
        raise ConfigError(
            "expected a folder on each host, such as /scratch/me; given a URL; give a path without ://"
        )
    return place(text)


def _parse_period(value: object) -> Period:
    if isinstance(value, Period):
        return value
    if not isinstance(value, str):
        raise ConfigError(
            f'expected a period START..END, such as "2001-01-01..2002-01-01" (END not included); '
            f"given {_shown(value)}; write it so, in quotes"
        )
    return Period.parse(value)


def _require_different(folds: tuple[int, ...]) -> tuple[int, ...]:
    if not folds or len(set(folds)) < len(folds):
        raise ConfigError(
            f"expected one or more different fold numbers; given {_shown(folds)}; name each fold once, "
            "or leave the setting out for all"
        )
    return folds


def _check_rounding(value: object) -> object:
    if value in ("none", "fluxes", "all"):
        return value
    if not isinstance(value, Mapping) or not all(type(b) is int and 1 <= b <= 23 for b in value.values()):
        raise ConfigError(
            'expected "none", "fluxes", "all", or a table of bits from 1 to 23 a variable or group, such as '
            f"{{fluxes = 12, soil_moisture = 16}}; given {_shown(value)}; correct it"
        )
    return value


def _setting(check: Callable[[Any], object]) -> Callable[[Any], object]:
    """``check`` for pydantic, which only says the setting's name with a ValueError."""

    def checked(value: Any) -> object:
        try:
            return check(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    return checked


Place = Annotated[str, AfterValidator(_setting(place))]
LocalPlace = Annotated[str, AfterValidator(_setting(_local_place))]
PeriodSetting = Annotated[
    Period, BeforeValidator(_setting(_parse_period)), PlainSerializer(str, return_type=str)
]
FoldNumbers = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_setting(_require_different))]
Sizes = tuple[PositiveInt, ...]
"""Cells along each spatial axis."""
Rounding = Annotated[
    Literal["none", "fluxes", "all"] | dict[str, int], BeforeValidator(_setting(_check_rounding))
]
"""A word for all daily outputs, or the bits each variable or group keeps."""
Stamp = Literal["start", "middle", "end"]
"""Which moment of its interval a time stamp names."""


class StorageOptions(Mapping[str, Mapping[str, object]]):
    """fsspec options a protocol (``{"s3": {"key": ...}}``) whose values never appear in text.

    >>> StorageOptions({"s3": {"secret": "hush"}})
    StorageOptions(s3: ***)
    """

    def __init__(self, options: Mapping[str, Mapping[str, object]] | None = None) -> None:
        _require_tables({} if options is None else options)
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


def _require_tables(options: object) -> None:
    values = options if isinstance(options, Mapping) else {"": options}
    wrong = [str(name) for name, value in values.items() if not isinstance(value, Mapping)]
    if wrong:
        raise ConfigError(
            describe(
                "storage options belong to a protocol",
                where=".".join(filter(None, (_SECRET_TABLE, wrong[0]))),
                expected=f"a table a protocol, such as [{_SECRET_TABLE}.s3] with key and secret",
                actual="a value without a protocol (not shown)",
                fix=f"put it into [{_SECRET_TABLE}.PROTOCOL]; the protocol stands before :// in a URL",
            )
        )


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class VariableSource(_Settings):
    """Where a CF data set keeps one variable."""

    name: str | None = None
    """Array name in the store; the variable's own name if left out."""
    url: Place | None = None
    """Store, if it is not the data set's own."""
    group: str | None = None
    """Group inside the store."""
    units: str | None = None
    """Units, for an array that does not say them itself."""


class DataSettings(_Settings):
    """Which data set is read, and how it is laid out."""

    url: Place
    """Any fsspec URL, or path, of a Zarr store."""
    layout: Literal["published", "cf"] = "published"
    """How arrays are named and stored: as the published model's cube, or as any CF data set."""
    variables: dict[str, VariableSource] = Field(default_factory=dict)
    """CF layout: variable -> where it is. Variables left out keep their own name."""
    static: tuple[str, ...] = ("static",)
    """CF layout: the static features, one array each, or one array with a feature axis."""
    mask: VariableSource | None = None
    """CF layout: the land mask (non-zero = land); without it, land is where all static are finite."""
    period: PeriodSetting | None = None
    """Days to use, ``"2001-01-01..2002-01-01"`` (END not included); if left out those that all
    forcing variables have, but training refuses variables with different days."""


class Assignment(_Settings):
    """One line of an explicit fold: these cells have this role in these periods."""

    role: Literal["train", "validation", "test"]
    """What the observations of these cells and periods are for."""
    cells: tuple[int, ...] | None = None
    """Positions among the land cells, row-major; all if left out."""
    periods: tuple[PeriodSetting, ...] | None = None
    """All days if left out."""


class FoldSettings(_Settings):
    """How cells and periods are divided into training, validation and test."""

    n_folds: int = Field(10, ge=1, le=10_000)
    """Number of folds."""
    block: int = Field(5, ge=1)
    """Edge of a spatial block, in cells."""
    seed: int = Field(1, ge=0)
    """Of the blocks' distribution over folds."""
    explicit: tuple[tuple[Assignment, ...], ...] | None = None
    """Instead of spatial blocks, a list of ``{role, cells, periods}`` for each fold."""

    @property
    def count(self) -> int:
        """Number of folds."""
        return self.n_folds if self.explicit is None else len(self.explicit)


class ModelSettings(_Settings):
    """Which model, and the sizes of its networks."""

    name: str = "h2mv"
    """Model, as registered."""
    hidden: int = Field(100, ge=1)
    """Size of the LSTM's state; compiled days are fastest if it is a multiple of 4."""
    encoder: int = Field(150, ge=1)
    """Width of the network that condenses the static features."""
    condensed: int = Field(12, ge=1)
    """Number of condensed static features."""


CodePath = Literal["auto", "compiled", "eager"]
"""How days are run."""


class TrainingSettings(_Settings):
    """How folds are trained."""

    folds: FoldNumbers | None = None
    """Folds to train; all if left out."""
    ranks: int = Field(1, ge=1)
    """Processes a fold is trained with."""
    epochs: int = Field(5000, ge=1)
    """Most epochs of a fold."""
    patience: int = Field(30, ge=1)
    """Training stops when the best epoch is this many epochs ago."""
    batch_size: int = Field(256, ge=1)
    """Cells a step, over all ranks."""
    learning_rate: float = Field(0.01, gt=0)
    """Of AdamW, at the start."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW."""
    clip_value: float = Field(0.5, gt=0)
    """Largest value of any gradient component."""
    plateau_epochs: int | None = Field(None, ge=1)
    """Lower the learning rate whenever the best epoch is this many epochs ago; never if left out."""
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    """What the learning rate is multiplied with then."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the networks' products; physics, states and weights always are float32."""
    cells_at_once: int | None = Field(None, ge=1)
    """Most cells a rank holds a graph for, if memory is short; its share of the batch if left out."""
    truncation_days: int | None = Field(None, ge=1)
    """Gradients do not flow back across multiples of so many days; over the whole period if left out."""
    spinup_days: int | None = Field(None, ge=0)
    """Days run before each simulation to fill the stores; the whole period if left out."""
    targets: tuple[str, ...] | None = None
    """Observed variables to train on; all of the model's if left out."""
    scaler: Literal["fit", "published"] = "fit"
    """``fit``: statistics of the fold's training cells; ``published``: those in the data set."""
    seed: int = Field(0, ge=0)
    """Of initial weights and the order of cells."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of each rank on a CPU. If left out, those of its worker; where it has several and a fold
    is large, fewer if they are about as fast, as measured before the first step (compiled: for minutes)."""
    code_path: CodePath = "auto"
    """``compiled``: blocks of days as one piece of machine code each, three to four times as fast; takes a
    C++ compiler and two minutes before the first step. ``eager``: the model as it is written. ``auto``:
    compiled on CPUs with a compiler where that is worth them."""
    recompute: bool | None = None
    """Compute each block of days once more when going backward, instead of remembering it: a quarter more
    time, a tenth of the memory (compiled; half of it as written). Where memory would not suffice otherwise
    if left out."""
    attempts: int = Field(3, ge=1)
    """How often a fold may fail, without an epoch in between, before it counts as failed."""
    stuck_seconds: float = Field(600.0, gt=0)
    """A rank that takes longer for a step is considered stuck, and its gang starts again."""
    keep_every: int | None = Field(None, ge=1)
    """Keep the checkpoint of every so many epochs, beside the best and the last one."""
    priority: int = 0
    """Jobs with a higher one get workers first."""
    cache: LocalPlace | None = None
    """Folder of each host where cells are staged; the user's cache folder if left out."""
    cache_limit: ByteSize | None = Field(None, gt=0)
    """Most bytes of it (``"200GB"``); what was not used for longest makes room. No limit if left out."""

    @model_validator(mode="after")
    def _plateau_comes_before_the_end(self) -> Self:
        if self.plateau_epochs is not None and self.plateau_epochs >= self.patience:
            raise ValueError(
                f"plateau_epochs ({self.plateau_epochs}) must be less than patience ({self.patience}): "
                "training would stop before the learning rate is lowered"
            )
        return self

    @model_validator(mode="after")
    def _every_rank_has_a_cell(self) -> Self:
        if self.batch_size < self.ranks:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be at least ranks ({self.ranks}): raise it, or use "
                "fewer ranks"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that change numbers: without limits, of memory or epochs, and places."""
        elsewhere = {"attempts", "cache", "cache_limit", "stuck_seconds", "keep_every", "priority"}
        limits = {"folds", "epochs", "patience", "recompute"}
        return self.model_dump(mode="json", exclude=limits | elsewhere)


class InferenceSettings(_Settings):
    """What an output cube holds, and how it is cut into tiles, shards and chunks."""

    period: PeriodSetting | None = None
    """Days to simulate, written as ``data.period``; all days of the forcing if left out."""
    outputs: tuple[str, ...] | None = None
    """Variables to write, by name or group (fluxes, stores, fractions, learned); all if left out."""
    members: Literal["spread", "all", "both"] = "spread"
    """``spread``: mean and standard deviation over folds; ``all``: a member axis; ``both``."""
    monthly: bool = False
    """Also keep means over calendar months, of whole months only."""
    rounding: Rounding = "none"
    """Daily outputs that keep 12 bits of their mantissa (relative errors up to 0.012 %) and compress better:
    ``none``; ``fluxes``: all but stores; ``all``. Or the bits that outputs keep, by name or group as for
    ``outputs``, ``{fluxes = 12, runoff = 16}``: N bits mean relative errors up to 2**-(N + 1), and 23 leave
    values as they are; a name comes before its group, and what is not named is not rounded."""
    compression: Literal["zstd", "blosc"] = "zstd"
    """``zstd``: level 1, which makes these numbers as small as higher levels do; ``blosc``: LZ4 of shuffled
    bytes, several times as fast to write, about a fifth larger."""
    folds: FoldNumbers | None = None
    """Folds to run; every trained one if left out."""
    spinup_days: int | None = Field(None, ge=0)
    """Days run to fill the stores, from the period's start; the whole period if left out."""
    baseline: PeriodSetting | None = None
    """Days whose mean anomalies refer to; the whole period if left out."""
    preset: Literal["series", "maps"] = "series"
    """What chunks are for, where they are not set: ``series``: small boxes over many days; ``maps``: whole
    shards of single days."""
    tile: Sizes = (20, 20)
    """Cells of a tile along each spatial axis; a multiple of the shard."""
    shard: Sizes = (20, 20)
    """Cells of a shard along each spatial axis; a multiple of the chunk."""
    chunk: Sizes = (10, 10)
    """Cells of a chunk along each spatial axis."""
    shard_days: int = Field(360, ge=1)
    """Days of a shard, and of one time block in memory; compiled days are fastest if it is a multiple of 16,
    or much longer."""
    chunk_days: int = Field(120, ge=1)
    """Days of a chunk."""
    state_days: int | None = Field(None, ge=1)
    """Keep the models' states every so many days, a multiple of ``shard_days``: ``infer --from`` can go back
    to them, and a tile that is interrupted goes on from them. Only at the end if left out."""
    keep_states: int = Field(40, ge=1)
    """States are kept of a cube's last so many times ``shard_days`` days, wherever one of its ends was."""
    threads: int = Field(1, ge=1)
    """Torch threads of each worker."""
    code_path: CodePath = "auto"
    """As ``training.code_path``; ``auto`` means what the cube was begun with. Workers that cannot compile run
    days as they are written, which differs by rounding."""
    attempts: int = Field(3, ge=1)
    """How often a tile may fail before it counts as failed."""
    overwrite: bool = False
    """Replace an existing cube that holds something else."""

    @model_validator(mode="before")
    @classmethod
    def _chunks_of_maps(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("preset") != "maps":
            return given
        whole = given.get("shard", cls.model_fields["shard"].default)
        return {"chunk": whole, "chunk_days": 1, **given}

    @model_validator(mode="after")
    def _sizes_have_the_same_axes(self) -> Self:
        lengths = {name: len(getattr(self, name)) for name in ("chunk", "shard", "tile")}
        if len(set(lengths.values())) > 1 or not all(lengths.values()):
            given = ", ".join(f"{n} for {name}" for name, n in lengths.items())
            raise ValueError(
                f"chunk, shard and tile need one number for each spatial axis; given {given}; "
                "give all three the same length"
            )
        return self

    @model_validator(mode="after")
    def _shards_hold_whole_chunks(self) -> Self:
        pairs = [("shard_days", self.shard_days, self.chunk_days)]
        pairs += [] if self.state_days is None else [("state_days", self.state_days, self.shard_days)]
        pairs += [("shard", s, c) for s, c in zip(self.shard, self.chunk, strict=True)]
        for name, outer, inner in pairs:
            if outer % inner:
                what = "shard_days" if name == "state_days" else "its chunk"
                raise ValueError(f"{name} ({outer}) must be a multiple of {what} ({inner})")
        return self


class PrepareSettings(_Settings):
    """How ``h2mv-dist prepare`` cuts forcing, and how it makes days of shorter steps."""

    stamps: dict[str, Stamp] = Field(default_factory=dict)
    """Variable -> moment of its interval that a time stamp names, ``{precipitation = "end"}``: start, middle
    or end. If left out, CF bounds of the time axis decide; without them it is the start, but amounts (mm, not
    mm an hour) are refused."""
    shard: Sizes = (20, 20)
    """Cells of a shard along each spatial axis; a multiple of the chunk. Best the tile of inference."""
    chunk: Sizes = (20, 20)
    """Cells of a chunk along each spatial axis."""
    shard_days: int = Field(360, ge=1)
    """Days of a shard; a worker holds so many days of one variable, all cells, in memory."""
    chunk_days: int = Field(120, ge=1)
    """Days of a chunk."""
    attempts: int = Field(3, ge=1)
    """How often a stretch of days may fail before it counts as failed."""
    overwrite: bool = False
    """Replace a prepared store that holds something else."""

    @model_validator(mode="after")
    def _shards_hold_whole_chunks(self) -> Self:
        pairs = [(self.shard_days, self.chunk_days), *zip(self.shard, self.chunk, strict=False)]
        if len(self.shard) != len(self.chunk) or any(outer % inner for outer, inner in pairs):
            raise ValueError(
                f"shard ({list(self.shard)}, {self.shard_days} days) must be a multiple of chunk "
                f"({list(self.chunk)}, {self.chunk_days} days) along each axis"
            )
        return self


_BYTES: Final = r"[\d.]+ ?[kKMGTP]?i?B?"


class TlsSettings(_Settings):
    """Files that encrypt and authenticate every connection of a cluster, in both directions (PEM)."""

    ca_file: str
    """Certificates of the authority that signed the certificates of all parts of the cluster."""
    cert: str
    """This side's certificate."""
    key: str
    """Private key of that certificate."""


class SlurmSettings(_Settings):
    """What one Slurm job asks for; a job holds ``processes`` workers."""

    queue: str | None = None
    """Partition; Slurm's default if left out. What is left out here may stand in dask-jobqueue's own file."""
    account: str | None = None
    """Account that is charged; Slurm's default if left out."""
    cores: int = Field(1, ge=1)
    """CPU cores of a job, over all of its workers."""
    memory: str = Field("4GiB", pattern=f"^{_BYTES}$")
    """Memory of a job, over all of its workers."""
    processes: int = Field(1, ge=1)
    """Workers of a job; for ``dask_cuda.cli`` its number of GPUs."""
    walltime: str | None = None
    """Time limit of a job, as Slurm writes it (``01:00:00``); dask-jobqueue's 30 minutes if left out."""
    directives: tuple[str, ...] = ()
    """More ``#SBATCH`` options, such as ``--gres=gpu:4``."""
    prologue: tuple[str, ...] = ()
    """Shell lines before the workers start, such as ``module load``."""
    log_directory: str | None = None
    """Where the jobs' output goes; the current folder if left out."""
    worker_command: Literal["distributed.cli.dask_worker", "dask_cuda.cli"] = "distributed.cli.dask_worker"
    """``dask_cuda.cli`` starts one worker a GPU."""


class ClusterSettings(_Settings):
    """Where work runs."""

    kind: Literal["auto", "local", "cuda", "address", "slurm"] = "auto"
    """``auto``: the running scheduler if one is named, else the GPUs if there are any, else the CPU. Who says
    one of kind, address and scheduler file, as on a command line, replaces all three of file, job or site."""
    workers: int | None = Field(None, ge=1, le=10_000)
    """Worker processes, over all Slurm jobs; ``cuda`` starts one a visible GPU instead. If left out: two for
    Slurm; for ``local`` one a core, or fewer if they have several threads, or if memory gave each less than
    ``memory_limit`` (``auto``: 2 GiB), but with ``h2mv-dist train`` at least ``training.ranks``, and no more
    than all folds have use for."""
    address: str | None = None
    """Running scheduler, for ``kind = "address"``."""
    scheduler_file: str | None = None
    """File in which a running scheduler left its address, instead of the address."""
    threads_per_worker: int = Field(1, ge=1)
    """Dask tasks of a worker at a time; ``training.threads`` are torch's."""
    memory_limit: str = Field("auto", pattern=f"^(auto|{_BYTES})$")
    """Memory of a worker, ``4GiB``; ``auto``: a share of the machine's or Slurm job's; ``0``: no limit."""
    interface: str | None = None
    """Network interface to listen on (``ib0``); if left out, loopback, for Slurm the default route's."""
    port_range: str | None = Field(None, pattern=r"^\d{1,5}:\d{1,5}$")
    """First and last port of workers, nannies and the place where ranks meet (``3000:3026``); any free ones
    if left out. Ranks train over gloo or nccl, which need free ports between the hosts besides."""
    local_directory: str | None = None
    """Folder of the workers' scratch files; Dask's own choice if left out."""
    tls: TlsSettings | None = None
    """Dask's configuration (``distributed.comm.tls``) if left out."""
    slurm: SlurmSettings = SlurmSettings()

    @model_validator(mode="after")
    def _address_needs_one(self) -> Self:
        named = [place for place in (self.address, self.scheduler_file) if place is not None]
        if len(named) > 1 or (self.kind == "address" and not named):
            raise ValueError('kind = "address" and an address go together: give address or scheduler_file')
        if named and self.kind not in ("auto", "address"):
            raise ValueError(f'kind = "address" and an address go together, not kind = "{self.kind}"')
        return self

    @model_validator(mode="after")
    def _ports_for_all(self) -> Self:
        if self.port_range is not None:
            first, last = map(int, self.port_range.split(":"))
            if not 0 < first < last < 65536:
                raise ValueError("port_range is FIRST:LAST with FIRST < LAST < 65536")
        return self


class SweepSettings(_Settings):
    """Several trainings in one job: every combination of values, each with every seed."""

    values: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Setting of training or model -> values to try, ``{"training.learning_rate" = [0.005, 0.01]}``."""
    seeds: int = Field(1, ge=1, le=10_000)
    """Seeds from ``training.seed`` on."""


class Settings(_Settings):
    """Everything a job needs to know."""

    data: DataSettings
    folds: FoldSettings = FoldSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    inference: InferenceSettings = InferenceSettings()
    prepare: PrepareSettings = PrepareSettings()
    cluster: ClusterSettings = ClusterSettings()
    sweep: SweepSettings = SweepSettings()

    @model_validator(mode="after")
    def _every_process_reaches_the_data(self) -> Self:
        sources = {f"variables.{name}.": source for name, source in self.data.variables.items()}
        for name, source in {"": self.data, **sources, "mask.": self.data.mask}.items():
            if source is not None and source.url is not None and _in_memory(source.url):
                raise ValueError(f"data.{name}url: {_ONE_PROCESS}")
        return self


class _ClusterSection(_Settings):
    cluster: ClusterSettings = ClusterSettings()


SettingsLike = str | Path | Mapping[str, Any]
"""A TOML file, or the same as a mapping of sections."""
_SECRET_TABLE: Final = "storage_options"
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_WHICH_CLUSTER: Final = frozenset({"kind", "address", "scheduler_file"})
"""Settings of the cluster that say which one it is."""
SITE: Final = "h2mv_dist"
"""The section of Dask's configuration."""
_NOT_TOML: Final = (ValueError, RecursionError)
"""What Python's reader raises; the latter where lists are nested too deep for it."""
_LONGEST_FILE: Final = 64 * 2**20
"""Bytes of a settings file; explicit folds of a fine grid take some of them."""
_S = TypeVar("_S", bound=_Settings)


def load(
    path: SettingsLike | None, overrides: Sequence[str] = (), site: Mapping[str, Any] = _NOTHING
) -> tuple[Settings, StorageOptions]:
    """Read settings from a TOML file, or a mapping like one, and apply ``section.key=value`` overrides.

    The file's table ``[storage_options.PROTOCOL]`` is returned apart, so that it cannot reach a record.

    Args:
        path: of the file, if there is one.
        overrides: they come before what the file says.
        site: sections of Dask's configuration, which the file comes before.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or not valid.
    """
    tree, where = _read(path, overrides)
    secrets = StorageOptions(tree.pop(_SECRET_TABLE, None))
    return _built(Settings, {"data": {}, **tree}, where, site), secrets


def load_cluster(
    path: SettingsLike | None, overrides: Sequence[str] = (), site: Mapping[str, Any] = _NOTHING
) -> ClusterSettings:
    """Read the cluster section alone; the other sections may be missing, and are not looked at.

    Raises:
        ConfigError: the file cannot be read, or a section or a cluster setting is unknown or not valid.
    """
    tree, where = _read(path, overrides)
    others = {*Settings.model_fields, _SECRET_TABLE} - {"cluster"}
    own, of_site = (
        {name: section for name, section in sections.items() if name not in others}
        for sections in (tree, site)
    )
    return _built(_ClusterSection, own, where, of_site).cluster


def revise(settings: Settings, overrides: Sequence[str], file: SettingsLike | None = None) -> Settings:
    """Settings with the cluster section of a file, and ``section.key=value`` overrides, which come first.

    Storage options of either are ignored.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or not valid.
    """
    of_file = {"cluster": load_cluster(file).model_dump(mode="json", exclude_unset=True)}
    changes = _changes(overrides)
    changes.pop(_SECRET_TABLE, None)
    tree = layered(layered(to_json(settings), of_file), changes)
    return validate(tree, where="command line" if file is None else f"{file} and the command line")


def load_options(path: SettingsLike | None, overrides: Sequence[str] = ()) -> StorageOptions:
    """The storage options alone, of a file and of overrides (``storage_options.s3.key=...``).

    Raises:
        ConfigError: the file cannot be read.
    """
    return StorageOptions(_read(path, overrides)[0].get(_SECRET_TABLE))


def validate(tree: Mapping[str, Any], where: str) -> Settings:
    """Build settings from a plain tree.

    Raises:
        ConfigError: naming each wrong setting and, for an unknown one, the nearest valid name.
    """
    return _built(Settings, {"data": {}, **tree}, where)


def to_json(settings: Settings) -> dict[str, Any]:
    """Settings as a JSON-able tree that :func:`validate` reads back."""
    tree: dict[str, Any] = settings.model_dump(mode="json")
    return tree


def _built(model: type[_S], tree: Mapping[str, Any], where: str, site: Mapping[str, Any] = _NOTHING) -> _S:
    try:
        return model.model_validate(layered(site, tree))
    except ValidationError as error:
        sources = f"{where} and Dask's configuration, {SITE}" if site else where
        lines = [f"settings in {sources} are not valid (h2mv-dist settings explains all of them):"]
        for problem in error.errors():
            place = problem["loc"][:-1] if problem["type"] == "missing" else problem["loc"]
            prefix = f"{SITE}." if _holds(site, place) and not _holds(tree, place) else ""
            lines.append(_PASSWORD.sub(r"\1***@", prefix + _explain(problem)))
        raise ConfigError("\n  ".join(lines)) from None


def _holds(tree: Any, location: Sequence[int | str]) -> bool:
    """Whether a tree says something of a setting, or of what it is a part of.

    >>> _holds({"folds": {"seed": 2}}, ("folds", "seed")), _holds({"folds": {}}, ("folds", "seed"))
    (True, False)
    """
    for name in location:
        if not isinstance(tree, Mapping):
            return True
        if name not in tree:
            return False
        tree = tree[name]
    return True


def _read(path: SettingsLike | None, overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The plain tree of a file and overrides, and where it is from."""
    given = path if isinstance(path, Mapping) else {} if path is None else _read_toml(path)
    name = "the mapping" if isinstance(path, Mapping) else path
    tree = layered(given, _changes(overrides))
    origins = [*([str(name)] if name is not None else []), *(["the command line"] if overrides else [])]
    return tree, " and ".join(origins) or "no file"


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LONGEST_FILE + 1)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "check the path") from error
    if len(content) > _LONGEST_FILE:
        raise _unreadable(path, f"more than {_LONGEST_FILE} bytes", "give a settings file")
    try:
        return tomllib.loads(content.decode())
    except _NOT_TOML as error:
        raise _unreadable(path, str(error), "correct that line") from error


def _unreadable(path: str | Path, reason: str, fix: str) -> ConfigError:
    return ConfigError(
        describe(
            "cannot read the settings",
            where=str(path),
            expected='a TOML file with at least [data] and url = "..."',
            actual=reason,
            fix=f"{fix}; `h2mv-dist settings > settings.toml` writes one to start from",
        )
    )


def _changes(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply(tree, override)
    return tree


def layered(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over others; those that say which cluster to use count together, or not at all.

    >>> layered({"cluster": {"kind": "slurm", "workers": 4}}, {"cluster": {"address": "tcp://host:8786"}})
    {'cluster': {'workers': 4, 'address': 'tcp://host:8786'}}
    """
    cluster = below.get("cluster")
    if _are_tables(cluster, above.get("cluster")) and _WHICH_CLUSTER & above["cluster"].keys():
        rest = {key: value for key, value in below["cluster"].items() if key not in _WHICH_CLUSTER}
        below = {**below, "cluster": rest}
    return _merged(below, above)


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = (key for key in changes if _are_tables(tree.get(key), changes[key]))
    return {**tree, **changes, **{key: _merged(tree[key], changes[key]) for key in both}}


def _are_tables(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in the tree; the value is TOML, or a plain string."""
    key, separator, text = (part.strip() for part in override.partition("="))
    if not separator or not key:
        name = re.match(r"[\w.]*", key)
        raise _unreadable_override(
            f"--set {name and name[0]}...", "no name before =" if separator else "no ="
        )
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, 1):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            earlier = ".".join(sections[:depth])
            raise _unreadable_override(f"--set {key}=...", f"{earlier} was set to a value before")
    tree[last] = _toml_value(text)


def _unreadable_override(where: str, actual: str) -> ConfigError:
    return ConfigError(
        describe(
            "cannot read an override",
            where=where,
            expected="section.key=value, such as training.epochs=20, in a section that is a table",
            actual=f"{actual} (its value is not shown)",
            fix="correct it, or drop one of two overrides that contradict each other",
        )
    )


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except _NOT_TOML:
        return text


_EXPECTED: Final = {
    "missing": "a value",
    "byte_size": 'a size, such as "200GB"',
    "model_type": "a table of settings",
    "dict_type": "a table",
    "tuple_type": 'a list, such as [0, 1] or ["a", "b"]',
}
"""What to expect where pydantic speaks of Python's types."""
_MOST_SHOWN, _LONGEST_SHOWN = 20, 200
"""Items of a list and characters of a value in a message."""
_WORDS: Final = {"Input should be ": "", "String should match": "text that matches"}


def _explain(problem: Any) -> str:
    """One line: the setting, what was expected, what was given (never what may be a secret), what to do."""
    location = [str(part) for part in problem["loc"]]
    name, kind, message = ".".join(location), problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        return f"{name}: unknown setting; {nearest(location[-1], _valid_names(location[:-1]))}"
    if kind == "value_error":
        return ": ".join(filter(None, (name, message.removeprefix("Value error, "))))
    for words, ours in _WORDS.items():
        message = message.replace(words, ours)
    given = "nothing" if kind == "missing" else _shown(problem["input"])
    fix = "add it" if kind == "missing" else "correct it"
    return f"{name}: expected {_EXPECTED.get(kind, message)}; given {given}; {fix}"


def _shown(value: object) -> str:
    """A value in a message; of tables not even the keys."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        more = ", ..." if len(value) > _MOST_SHOWN else ""
        return f"[{', '.join(map(_shown, value[:_MOST_SHOWN]))}{more}]"
    text = as_toml(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def as_toml(value: object) -> str:
    """A default, or any other value that is no table with keys.

    >>> print(as_toml(("a", 1, True)))
    ["a", 1, true]
    """
    return json.dumps(value, default=str, ensure_ascii=False)


def _valid_names(sections: Sequence[str]) -> tuple[str, ...]:
    model: type[BaseModel] = Settings
    for section in sections:
        field = model.model_fields.get(section)
        model = (field and model_inside(field.annotation)) or model
    names = tuple(model.model_fields)
    return (*names, _SECRET_TABLE) if model is Settings else names


def model_inside(annotation: Any) -> type[BaseModel] | None:
    """The settings an annotation holds, whatever is around them (None, a dict, tuples)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := model_inside(inner))), None)


def canonical_json(record: object) -> str:
    """JSON with one spelling for one value, for checksums and comparable records.

    >>> canonical_json({"b": 1, "a": [1.5]})
    '{"a":[1.5],"b":1}'
    """
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
