"""Starts a toy as the command line starts a run: `python -m tests.cluster.run_toy TOY RUN_DIR [FIELD=VALUE]...`."""

import sys
from pathlib import Path

import yaml

from qlora_dist.cluster.launch import launch
from tests.cluster.toys import toy_config

if __name__ == "__main__":
    fields = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in sys.argv[3:])}
    sys.exit(launch(toy_config(**fields), Path(sys.argv[2]), f"tests.cluster.toys:{sys.argv[1]}"))
