#!/bin/bash
# Ranks on the machines of a host file, one line a machine: "name:slots" (MPICH) or "name slots=8" (Open MPI).
# MASTER_ADDR may stay unset: where the launcher does not say which machine rank 0 is on, the ranks ask over MPI
# (pip install "dcompile[mpi]").
export DCOMPILE_CACHE_DIR="$HOME/.cache/dcompile"

# Open MPI hands on only the variables it is told to: mpirun -x DCOMPILE_CACHE_DIR
exec mpirun -n 16 --hostfile hosts dcompile-launch train.py --checkpoint-dir checkpoints --resume
