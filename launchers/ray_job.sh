#!/usr/bin/env bash
# Submits a run to a Ray cluster by Ray's own command, shows its output, and ends with its exit code:
#
#   export RAY_API_SERVER_ADDRESS=http://HOST:8265     # where `ray start --head` said that the dashboard is
#   export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=...      # where the cluster wants a token
#   launchers/ray_job.sh configs/llama-3.1-8b.yaml output_dir=/shared/runs/a train.max_steps=500
#
# The same command again resumes the run. Ctrl-C leaves it running; `qlora-dist stop /shared/runs/a`, on any machine
# that sees the folder, stops it with a checkpoint, and so does `ray job stop` where that takes less than 120 s.
# `qlora-dist submit ray` does the same and asks for a checkpoint on Ctrl-C.
#
# The configuration travels to the cluster, secrets do not: nodes need HF_TOKEN, WANDB_API_KEY and the like of their own.
# What to change: PYTHON, where the cluster's Python that has qlora-dist is not `python`.
set -euo pipefail

config=${1:?usage: launchers/ray_job.sh CONFIG [section.field=value ...]}
shift
python=${PYTHON:-python}

folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
# Resolved here, with absolute paths: the job starts in a folder of Ray's. It joins the cluster that it is on.
qlora-dist config show --absolute "$config" "$@" launch.backend=ray launch.address=null > "$folder/config.yaml"

ray job submit \
  --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" \
  --working-dir "$folder" \
  --runtime-env-json '{"env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": "120"}}' \
  -- "$python" -m qlora_dist.cli train config.yaml
