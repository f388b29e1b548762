"""The hybrid models: torch only; no dask, zarr or xarray."""
