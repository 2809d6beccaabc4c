# shellcheck shell=bash
# What is particular to your cluster: edit this file once, or set the variables where you call sbatch.
# Partition, account and the like are sbatch's own: SBATCH_PARTITION, SBATCH_ACCOUNT, ..., or its command line.

# Where qlora-dist is installed, on storage that all nodes share; the python on the PATH where there is none.
: "${QLORA_DIST_VENV:=$QLORA_DIST_HOME/.venv}"
# Logs of every attempt, and the Ray token while the job runs; on storage that all nodes share.
: "${QLORA_DIST_LOGS:=$SLURM_SUBMIT_DIR/logs}"
# A folder of each node's own, for sockets and temporary files. Short: sockets below it may have 107 characters.
: "${QLORA_DIST_SCRATCH:=/tmp}"
# ray, or torchrun.
: "${LAUNCHER:=ray}"
# Workers on each node: its GPUs, else 1.
: "${WORKERS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
# Seconds that a checkpoint at the next step boundary and the end may take after SIGUSR1 (the notice is 120 s).
: "${STOP_S:=100}"
# Seconds for all nodes to join.
: "${JOIN_S:=180}"
# Requeues of a job, after a notice or the loss of a node.
: "${MAX_REQUEUES:=10}"
# Under torchrun; Ray's restarts are launch.max_restarts.
: "${MAX_RESTARTS:=0}"

# module load cuda/12.8
# export HF_HOME=/shared/huggingface

# What every process of the job is started through, such as CONTAINER=(apptainer exec --nv /shared/qlora-dist.sif).
CONTAINER=()

# shellcheck source=slurm/job.sh
source "$QLORA_DIST_HOME/slurm/job.sh"
