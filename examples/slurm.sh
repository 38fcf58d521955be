#!/usr/bin/env bash
# A run on many nodes that saves its state before the time limit and queues itself again.
#
#     sbatch examples/slurm.sh --preset imagenet64-cond --kimg 300_000 --max-hours 23.8
#
# The arguments are those of sid_fast.train. Submit the same command with RUN set to the run's
# folder to continue a run that failed. srun starts one process per GPU, without torchrun, so that
# their exit status reaches this script.
#
#   RUN    run folder, on a file system that all nodes share
#   SETUP  command that makes `python` the one with sid_fast
#SBATCH --job-name=sid_fast
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sid_fast-%j.log
set -uo pipefail

RUN=${RUN:-runs/slurm-$SLURM_JOB_ID}
SETUP=${SETUP:-source .venv/bin/activate}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # the job's own: two jobs may share a node
export SETUP MASTER_ADDR MASTER_PORT

if compgen -G "$RUN/state-*/state.json" >/dev/null; then # a complete state
  set -- --resume "$RUN" "$@"
else
  set -- --out "$RUN" "$@"
fi

# srun does not take --cpus-per-task from sbatch (SLURM 22.05 and later).
# shellcheck disable=SC2016  # for the shell of each process
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
  eval "$SETUP" && exec python -m sid_fast.train "$@"' train "$@" &
step=$!

# --max-hours saves a state in time and exits with status 75. Without it, SLURM sends this script
# SIGTERM ten minutes before the time limit (--signal above). scancel passes it on to the processes,
# which save a state after the current step and exit with status 143. A SIGTERM to srun itself would
# make it kill them with SIGKILL.
stopped=0 interrupted=0
trap 'stopped=1 interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
while true; do
  wait "$step"
  status=$?
  ((interrupted)) || break # else the trap ended the wait
  interrupted=0
done

# Not after scancel, which signals the processes and not this script, nor after an error.
if ((status == 75 || (stopped && status == 143))); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
