"""Work on a cluster: the only place that imports dask."""
