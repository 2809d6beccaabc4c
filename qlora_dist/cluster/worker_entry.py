"""What our torchrun starts: `python -m qlora_dist.cluster.worker_entry RUN_DIR ATTEMPT MODULE:FUNCTION`."""

import os
import sys
from pathlib import Path

from qlora_dist.cluster.address_file import read_address
from qlora_dist.cluster.output import rank_log, send_output_to
from qlora_dist.cluster.parent import end_with_parent
from qlora_dist.cluster.process import choose_device, import_function
from qlora_dist.cluster.torchrun import CONFIG_VARIABLE, FENCED, KEY_VARIABLE
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import Fenced, HttpClient
from qlora_dist.coordinate.rundir import read_run
from qlora_dist.train.context import Worker


def main(run_dir: Path, attempt: int, train_name: str) -> int:
    """Be one worker; the exit code."""
    end_with_parent()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if rank != 0:
        send_output_to(rank_log(run_dir, attempt, rank))
    config = RunConfig.model_validate_json(os.environ[CONFIG_VARIABLE])
    try:
        url, token = read_address(run_dir, os.environ[KEY_VARIABLE], config.launch.start_timeout_s)
    except UserError as error:
        # Without the address there is no coordinator to tell.
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    client = HttpClient(url, token)
    try:
        worker = Worker(
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=local_rank,
            device=choose_device(config, local_rank),
            client=client,
            run_dir=run_dir,
            nonce=read_run(run_dir).nonce,
        )
        import_function(train_name)(config, worker)
    except UserError as error:
        client.call("fail", generation=None, rank=rank, kind="user", message=error.message)
    except Fenced:
        return FENCED
    # Anything but 0 makes torch's agent end the other ranks, which may not have noticed yet.
    return 2 if client.call("outcome")["kind"] == "user" else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
