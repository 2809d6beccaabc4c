"""What a run of islands starts: `python -m qlora_dist.cluster.island_entry`, with variables."""

import os
import sys

from qlora_dist.cluster.parent import end_with_parent
from qlora_dist.config.redact import redact
from qlora_dist.config.schema import RunConfig


def main() -> int:
    """Be the coordinator or an island; the exit code."""
    end_with_parent()
    role, config_json = os.environ.pop("QLORA_DIST_ROLE"), os.environ.pop("QLORA_DIST_CONFIG")
    try:
        if role == "coordinator":
            from qlora_dist.cluster import outer

            return outer.main(config_json)
        from qlora_dist.cluster.launch import launch

        config = RunConfig.model_validate_json(config_json)
        return launch(config, config.run_dir)
    except Exception as error:
        import traceback

        sys.stderr.write(redact(traceback.format_exc()))
        print(redact(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
