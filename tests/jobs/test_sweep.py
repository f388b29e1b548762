"""Every combination of values and seeds, and nothing that all runs must share."""

from typing import Any

import pytest

from h2mv_dist.config import Settings, validate
from h2mv_dist.errors import ConfigError
from h2mv_dist.jobs.sweep import parse_sweep, variants


def settings(**sweep: Any) -> Settings:
    return validate({"data": {"url": "none"}, "training": {"seed": 4}, "sweep": sweep}, where="test")


def test_without_a_sweep_there_is_one_run_with_the_settings_themselves() -> None:
    (only,) = variants(settings())
    assert (only.name, dict(only.values), only.settings) == ("", {}, settings())


def test_values_are_combined_with_seeds() -> None:
    found = variants(settings(values={"lr": [0.005, 0.01], "hidden": [8]}, seeds=3))
    assert [(v.settings.training.learning_rate, v.settings.training.seed) for v in found] == [
        (lr, seed) for lr in (0.005, 0.01) for seed in (4, 5, 6)
    ]
    assert {v.settings.model.hidden for v in found} == {8}
    assert found[0].name == "learning_rate=0.005,hidden=8,seed=4"
    assert len({v.name for v in found}) == 6
    assert all(not v.settings.sweep.values for v in found)


def test_values_from_a_command_line_are_typed() -> None:
    (one, two) = variants(settings(values=parse_sweep(["truncation_days=30,60"])))
    assert (one.settings.training.truncation_days, two.settings.training.truncation_days) == (30, 60)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"learning_rat": [1]}, "did you mean 'learning_rate'"),
        ({"training.targets": [["runoff"]]}, "cannot be swept"),
        ({"lr": [-1.0]}, "learning_rate"),
        ({"lr": []}, "sweep.values.lr(.|\n)*an empty list"),
        ({"lr": [0.01], "learning_rate": [0.02]}, "swept twice(.|\n)*'lr' and 'learning_rate'"),
        ({"training.learning_rate": [0.01], "lr": [0.02]}, "swept twice"),
        ({"lr": [0.01, 0.02, 0.01]}, "the same(.|\n)*learning_rate=0.01 and learning_rate=0.01"),
        (
            {"lr": ["0.01", "1e-2"], "hidden": [8, 16]},
            "the same(.|\n)*rate=0.01,hidden=8 and learning_rate=1e-2,hidden=8",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variants(settings(values=sweep))


def test_seeds_are_values_or_a_number() -> None:
    with pytest.raises(ConfigError, match=r"swept twice(.|\n)*training.seed(.|\n)*'seed' and 'seeds'"):
        variants(settings(values={"seed": [5, 7]}, seeds=3))
    assert [v.settings.training.seed for v in variants(settings(values={"seed": [5, 7]}))] == [5, 7]


def test_values_of_a_setting_that_is_given_again_are_added() -> None:
    assert parse_sweep(["lr=0.005", "hidden=8", "lr=0.01,0.02"]) == {
        "lr": ["0.005", "0.01", "0.02"],
        "hidden": ["8"],
    }


@pytest.mark.parametrize("argument", ["lr", "lr=", "lr=1,,2"])
def test_an_unreadable_sweep_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="cannot read a sweep"):
        parse_sweep([argument])
