"""Reading and writing arrays: numpy, zarr, xarray and fsspec; no torch, no dask."""
