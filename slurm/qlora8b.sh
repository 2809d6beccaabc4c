#!/bin/bash
#SBATCH --job-name=qlora8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

# Llama 3.1 8B on the GPUs of one node. From the repository's root:
#     sbatch slurm/qlora8b.sh                                      # configs/llama-3.1-8b.yaml
#     sbatch --gpus-per-node=4 slurm/qlora8b.sh my.yaml train.max_steps=500

QLORA_DIST_HOME=${QLORA_DIST_HOME:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/common.sh
source "$QLORA_DIST_HOME/slurm/common.sh"

(($#)) || set -- "$QLORA_DIST_HOME/configs/llama-3.1-8b.yaml"
run_train "$@"
