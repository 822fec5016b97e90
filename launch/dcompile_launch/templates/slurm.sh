#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8          # one task a GPU: srun's tasks are the ranks
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue                    # after a failure or a pre-emption the job resumes from its last checkpoint
#SBATCH --signal=TERM@120            # two minutes before the time is up: the script saves and leaves
#SBATCH --output=%x-%j.log

# The compile cache: on a disk that all machines share, or on each machine's own, where ranks on other machines get
# programs through the job's key-value store.
export DCOMPILE_CACHE_DIR="${SLURM_SUBMIT_DIR}/.dcompile-cache"
# What the ranks were communicating when one of them hung, a file each.
export DCOMPILE_FLIGHT_DIR="${SLURM_SUBMIT_DIR}/flights-${SLURM_JOB_ID}"

# A task takes its rank and the address of rank 0 from Slurm. One that fails ends the others (--kill-on-bad-exit).
exec srun --kill-on-bad-exit=1 --cpu-bind=cores \
  dcompile-launch train.py --checkpoint-dir "${SLURM_SUBMIT_DIR}/checkpoints" --resume
