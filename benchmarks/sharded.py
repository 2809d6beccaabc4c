"""Strategies side by side on the GPUs of one host: tokens/s, peak memory a GPU, seconds to the first step.

    python benchmarks/sharded.py benchmarks/sharded_runs.json --out benchmarks/results/sharded_h200.json

The first argument is a list of runs: a name, dotted overrides of sharded.yaml, and an environment. It is
`qlora-dist bench throughput --config benchmarks/sharded.yaml --points RUNS` with the median over the steps after the
first three.
"""

import argparse
from pathlib import Path

from qlora_dist.bench.commands import throughput


def main() -> None:
    """All runs of the list, one after the other; the JSON is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, default=200.0, help="for one run")
    parser.add_argument("--only", nargs="*", help="names of runs")
    arguments = parser.parse_args()
    throughput(
        config=Path(__file__).with_name("sharded.yaml"), points=arguments.runs, only=arguments.only, warm_up=3,
        point_limit_s=arguments.limit_s, out=arguments.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
