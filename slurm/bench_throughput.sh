#!/bin/bash
#SBATCH --job-name=qlora-bench
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=01:00:00
#SBATCH --output=slurm-%x-%j.out

# Tokens/s of whole training runs on random weights, so that nothing is downloaded: one JSON and one table.
#     sbatch --nodes=2 slurm/bench_throughput.sh --model llama-3.1-70b --set shard.strategy=fsdp,hybrid
# What it is given goes to `qlora-dist bench throughput` (docs/bench.md). Ray starts the workers.

QLORA_DIST_HOME=${QLORA_DIST_HOME:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/common.sh
source "$QLORA_DIST_HOME/slurm/common.sh"

run_bench "$@"
