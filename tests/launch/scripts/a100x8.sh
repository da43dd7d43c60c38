#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=12
#SBATCH --gres=gpu:8
#SBATCH --job-name=a
#SBATCH --mem=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/a/slurm/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --time=1440

# setup
export OMP_NUM_THREADS=12
export PYTHONPATH=/shared/runs/a/code/CODE${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
trap 'PYTHON -m launch.job close /shared/runs/a 3 0.0 || exit 1' EXIT

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/a/slurm/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 PYTHON -u -m submitit.core._submit /shared/runs/a/slurm
