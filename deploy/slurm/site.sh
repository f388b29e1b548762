# What is particular about your site; every job of this folder reads it.

# module load gcc
# source ~/h2mv-dist/.venv/bin/activate

# Network that schedulers and workers listen on. Jobs on one node need no other than lo;
# `srun --nodes=1 ip -brief -4 address` lists those of a compute node (ib0, eth0 ...).
export H2MV_INTERFACE=lo
