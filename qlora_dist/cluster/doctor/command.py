"""`qlora-dist doctor`: which ranks there are to ask, and what their facts come to."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_dist.cluster.doctor.examine import examine
from qlora_dist.cluster.doctor.group import examine_group, place_of
from qlora_dist.cluster.doctor.lines import Line
from qlora_dist.cluster.doctor.machine import port_facts
from qlora_dist.cluster.doctor.start import examine_machine
from qlora_dist.cluster.doctor.wanted import wanted_of, wanted_ports
from qlora_dist.cluster.ray_address import probe_address, ray_address
from qlora_dist.config.schema import RunConfig


def diagnose(
    config: RunConfig | None, address: str | None, folder: Path | None, ports: Sequence[int], limit_s: float
) -> tuple[list[Line], list[dict[str, Any]]] | None:
    """Look at this machine, at every node of a Ray cluster, or at every rank that torchrun or srun has started.

    Args:
        address: of the Ray cluster, in the place of `launch.address` and RAY_ADDRESS.
        folder: the run folder, in the place of `output_dir`.
        ports: that must be free here, beside those of the run.
        limit_s: seconds that one rank waits for another.

    Returns:
        The lines and the facts of all ranks; None on ranks other than 0.

    Raises:
        UserError: the Ray cluster cannot be joined, or what a launcher has set is there by halves.
    """
    on_ray = config is None or config.launch.backend == "ray"
    place, source = place_of(os.environ), "--address"
    if place is None and address is None and on_ray:
        address, source = ray_address(config.launch.address if config else None)
    wanted = wanted_of(config, address, folder)
    # Before anything listens on one of them.
    here = port_facts(wanted_ports(wanted, os.environ, ports))
    if place is not None:
        found = examine_group(wanted, place, here, limit_s)
        if found is None:
            return None
    elif wanted.address is not None:
        probe_address(wanted.address, source)
        # Here and not above: Ray takes seconds.
        from qlora_dist.cluster.doctor.ray_nodes import examine_cluster

        found = examine_cluster(wanted, source, here, limit_s)
    else:
        found = examine_machine(wanted, limit_s)
        found[0]["ports"] = here
    return examine(found, wanted), found
