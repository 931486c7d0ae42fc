#!/bin/bash
# sbatch configs/launch/slurm.sh run.yaml runs/first
#
# A run that survives its time limit and preemption. Slurm sends SIGTERM to all processes before the job ends; d2l
# finishes the step, saves, and ends. The job is put back into the queue, and goes on from its newest checkpoint. RUN has
# to lie on a file system that all nodes share.
#SBATCH --job-name=d2l
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=d2l-%j.log
set -uo pipefail
CONFIG=${1:?usage: sbatch slurm.sh CONFIG RUN}
RUN=${2:?usage: sbatch slurm.sh CONFIG RUN}

if [ -e "$RUN/run.json" ]; then
  train=(train --resume "$RUN")
else
  train=(train "$CONFIG" --output "$RUN")
fi

master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# --node-rank is each task's own number, so the inner shell expands it
srun bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --node-rank "$SLURM_NODEID" \
  --master-addr "$0" --master-port 29500 -m cli "$@"' "$master" "${train[@]}"
status=$?

# torchrun reports any code of a process as 1, so the run itself says whether it is done
if [ "$status" -ne 0 ] && tail -n 1 "$RUN/events.jsonl" 2>/dev/null | grep -q '"stopped after step'; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
