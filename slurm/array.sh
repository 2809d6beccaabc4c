#!/bin/bash
#SBATCH --job-name=qlora-array
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out

# One configuration a task, as one group in W&B; overrides after `--` go to all. From the repository's root:
#     sbatch --array=0-2 slurm/array.sh a.yaml b.yaml c.yaml -- train.max_steps=500

QLORA_DIST_HOME=${QLORA_DIST_HOME:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/common.sh
source "$QLORA_DIST_HOME/slurm/common.sh"

configs=()
while (($#)) && [[ $1 != -- ]]; do
    configs+=("$1")
    shift
done
(($#)) && shift
if [[ -z ${configs[${SLURM_ARRAY_TASK_ID:-0}]:-} ]]; then
    say "task ${SLURM_ARRAY_TASK_ID:-0} has no configuration: ${#configs[@]} are given, so give --array=0-$((${#configs[@]} - 1))"
    exit 2
fi
run_train "${configs[${SLURM_ARRAY_TASK_ID:-0}]}" "track.wandb_group=array-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" "$@"
