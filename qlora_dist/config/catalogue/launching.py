"""Starting the workers, and how they reach each other and the coordinator."""

from qlora_dist.config.catalogue.entry import Mendable

LAUNCHING: dict[str, Mendable] = {
    "torchrun-around-ray": Mendable(
        "this process is one of torchrun's workers (RANK and WORLD_SIZE are set), but launch.backend is ray",
        "set launch.backend=torchrun, or start the command without torchrun",
    ),
    "launched-by-halves": Mendable(
        "the launcher's variable {variable} is {found}",
        "start the command with torchrun or accelerate launch, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
        "MASTER_PORT for each process; without a launcher, unset them",
    ),
    "world-size-differs": Mendable(
        "launch.num_workers is {num_workers}, but WORLD_SIZE is {world_size}",
        "remove launch.num_workers, or start as many workers as it says",
    ),
    "one-process-many-workers": Mendable(
        "launch.backend=none is one process, but launch.num_workers={num_workers}",
        "set it to 1, or launch.backend to ray or torchrun",
    ),
    "too-few-gpus": Mendable(
        "launch.device={device} needs a GPU for each worker of this machine, but local rank {local_rank} finds {found}",
        "start fewer workers here or set launch.device=cpu",
    ),
    "ray-address-form": Mendable(
        "{source}={address} is not of the form HOST:PORT",
        "give the address that `ray start --head` printed, or submit the command to the cluster with `ray job submit`",
    ),
    "ray-not-there": Mendable(
        "no Ray cluster answers at {source}={address} ({error})",
        "start one there with `ray start --head`, or leave {source} out for a local one",
    ),
    "ray-not-joined": Mendable(
        "{source}={address} is no Ray cluster that can be joined ({error})",
        "give the address of a cluster of this Ray version, or leave {source} out for a local one",
    ),
    "cluster-too-small": Mendable(
        "launch.num_workers={workers} needs {needed}, and the Ray cluster has {found} on {nodes} node(s), room for "
        "{room} worker(s)",
        "lower launch.num_workers or launch.cpus_per_worker, or join a larger cluster with launch.address",
    ),
    "cluster-short-of-gpus": Mendable(
        "launch.num_workers={workers} needs {needed}, and the Ray cluster has {found} on {nodes} node(s), room for "
        "{room} worker(s)",
        "set launch.device=cpu, or lower launch.num_workers or launch.cpus_per_worker, or join a larger cluster with "
        "launch.address",
    ),
    "cluster-busy": Mendable(
        "the {workers} workers did not get their CPUs and GPUs within launch.start_timeout_s, since others on the Ray "
        "cluster hold them",
        "wait, lower launch.num_workers, or raise launch.start_timeout_s",
    ),
    "nodes-missing": Mendable(
        "launch.num_workers is [{least}, {most}], and for {seconds} s (launch.start_timeout_s) the Ray cluster had "
        "room for {room} worker(s)",
        "bring nodes back, lower the first number, or raise launch.start_timeout_s; the same command goes on from the "
        "last checkpoint",
    ),
    "ray-token": Mendable(
        "the Ray cluster at {source}={address} wants a token",
        "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head node",
    ),
    "ray-jobs-not-installed": Mendable(
        "submitting Ray jobs needs the extra packages of ray[default], and aiohttp is not installed",
        "run: pip install 'qlora-dist[ray-jobs]'",
    ),
    "ray-jobs-address-form": Mendable(
        "--address {address} is not of the form http://HOST:8265",
        "give the address of the cluster's dashboard, which `ray start --head` printed",
    ),
    "ray-jobs-not-there": Mendable(
        "nobody answers at --address {address} ({error})",
        "start Ray with its dashboard there (`ray start --head --dashboard-host=0.0.0.0`), or forward the port to here "
        "(ssh -L, kubectl port-forward)",
    ),
    "ray-jobs-token": Mendable(
        "the Ray cluster at {address} wants a token, or another one",
        "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head node",
    ),
    "ray-jobs-refused": Mendable(
        "the Ray cluster at {address} does not take the job ({error})",
        "see that it runs the same version of Ray as this machine, with its dashboard",
    ),
    "ray-jobs-lost": Mendable(
        "the cluster of job {job} has not answered for {seconds:.0f} s ({error})",
        "look there whether it goes on; submitting it again resumes it from the last checkpoint",
    ),
    "submit-needs-ray": Mendable(
        "launch.backend is {backend}, and what is submitted to a Ray cluster runs on Ray",
        "set launch.backend=ray",
    ),
    "world-size-out-of-range": Mendable(
        "launch.num_workers is [{least}, {most}], but WORLD_SIZE is {world_size}",
        "start torchrun with such numbers of nodes and processes, or widen launch.num_workers",
    ),
    "master-unreachable": Mendable(
        "MASTER_ADDR={host} cannot be reached from this node ({error})",
        "give torchrun an --rdzv-endpoint that every node resolves, and --local-addr where a host's name is not "
        "known to the others",
    ),
    "machine-too-small": Mendable(
        "launch.num_workers is [{least}, {most}], and this machine has {found} GPU(s)",
        "lower the first number, set launch.device=cpu, or start torchrun on several machines yourself",
    ),
    "run-already-running": Mendable(
        "the run in {run_dir} is already running on this Ray cluster",
        "wait for it, stop that job, or choose another output_dir",
    ),
    "run-already-alive": Mendable(
        "the run in {run_dir} is already running ({who})",
        "wait for it, stop that process, or choose another output_dir",
    ),
    "run-taken-over": Mendable(
        "another start of this run ({who}) has taken its place",
        "wait for it or choose another output_dir",
    ),
    "coordinator-address-form": Mendable(
        "the coordinator's address {url!r} is not of the form http://HOST:PORT",
        "give the address that the coordinator printed when it started",
    ),
    "coordinator-token": Mendable(
        "the coordinator at {url} refuses the token",
        "give the one that it was started with",
    ),
    "sbatch-not-found": Mendable(
        "there is no sbatch on this host",
        "run the command on a login node of a Slurm cluster, or print the script with --print and submit it there",
    ),
    "sbatch-refused": Mendable(
        "sbatch did not take the job ({error})",
        "give what your cluster wants in SBATCH_PARTITION, SBATCH_ACCOUNT and the like, or other --nodes, "
        "--gpus-per-node and --time",
    ),
    "slurm-uneven": Mendable(
        "launch.num_workers={workers} is not {nodes} node(s) of {per_node} worker(s)",
        "give both --nodes and --gpus-per-node, or a launch.num_workers that is a multiple",
    ),
    "slurm-secret": Mendable(
        "the override of {field} holds a secret, which others could read in the batch script",
        "put it into the environment of the job, or into a file that only you can read",
    ),
    "slurm-no-scripts": Mendable(
        "slurm/common.sh is not in {folder}: qlora-dist is installed without its repository",
        "install it with `pip install -e` from a clone on storage that all nodes share",
    ),
}
