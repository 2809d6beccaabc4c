#!/bin/bash
#SBATCH --job-name=qlora70b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

# Llama 3.1 70B on the GPUs of N nodes, the frozen base sharded over all of them. From the repository's root:
#     sbatch slurm/qlora70b.sh                                                 # slurm/llama-3.1-70b.yaml
#     sbatch --nodes=4 slurm/qlora70b.sh my.yaml train.max_steps=500           # another file, and overrides
#     sbatch --nodes=4 slurm/qlora70b.sh my.yaml shard.strategy=hybrid         # one copy of the base a node
#     LAUNCHER=torchrun sbatch slurm/qlora70b.sh                               # instead of Ray

QLORA_DIST_HOME=${QLORA_DIST_HOME:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/common.sh
source "$QLORA_DIST_HOME/slurm/common.sh"

(($#)) || set -- "$QLORA_DIST_HOME/slurm/llama-3.1-70b.yaml"
run_train "$@"
