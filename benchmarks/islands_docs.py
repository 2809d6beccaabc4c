"""Writes the figures of the islands' benchmarks into docs/aggregation.md, between its marks.

    python -m benchmarks.islands_docs

A mark is `<!-- figures NAME -->`, and `<!-- end -->` ends what is replaced. Where there is no JSON the place stays as
it is.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import islands_figures, islands_overhead
from qlora_dist.bench import document

PAGE = Path("docs/aggregation.md")
RESULTS = Path("benchmarks/results")


def tldr(found: dict[str, Any]) -> str:
    """The table of islands_tldr.py, and its picture."""
    picture = "![held-out loss over packs and over bytes](../benchmarks/results/islands_tldr.png)"
    return f"{islands_figures.table(found['records'])}\n\n{picture}"


def slow_link(found: dict[str, Any]) -> str:
    """The table of islands_slow_link.py."""
    cable, of_ddp = found["cable"], found["of_ddp"]
    lines = [
        f"{found['mbit']:g} Mbit/s (one TCP connection: {cable['tcp_mbit_per_s']:.0f}), round trip "
        f"{cable['round_trip_ms']:.0f} ms, {found['cores']} CPU cores ({found['cpu']}); DDP's gradients alone take "
        f"{found['ddp_cable_alone_s']:.0f} s on that link. {found['records'][0]['steps_a_worker']} steps a worker, an "
        f"exchange every {max(one['sync_every'] or 0 for one in found['records'])}.",
        "",
        "| side | wall time, s | of DDP's | step, s | MB over the link, each way | held-out loss, before and after |",
        "|---|---|---|---|---|---|",
    ]
    for one in found["records"]:
        share = f"{of_ddp[one['name']]:.2f}" if one["name"] in of_ddp else ""
        crossed = " / ".join(f"{megabytes:,.0f}" for megabytes in one["crossed_mb"])
        before, after = one["held_out_loss"]
        lines.append(
            f"| {one['name']} | {one['wall_s']:.0f} | {share} | {one['seconds_per_step']:.2f} | {crossed} "
            f"| {before:.3f}, {after:.3f} |"
        )
    return "\n".join(lines)


def overhead(found: dict[str, Any]) -> str:
    """The table of islands_overhead.py."""
    return f"{found['gpus']} x {found['device']}:\n\n{islands_overhead.table(found['records'])}"


BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "tldr": ("islands_tldr.json", tldr),
    "slow link": ("islands_slow_link.json", slow_link),
    "overhead": ("islands_overhead_8b_h200.json", overhead),
}


def fill(page: str, name: str, text: str) -> str:
    """The page with `text` at the place of a name.

    Raises:
        ValueError: the page has no such place, or several.
    """
    filled, places = re.subn(
        rf"(<!-- figures {re.escape(name)} -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{text}\n{match[2]}",
        page,
        flags=re.DOTALL,
    )
    if places != 1:
        raise ValueError(f"the page has {places} places for the figures {name!r}")
    return filled


def main() -> None:
    """Fill what there are results for."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    page = PAGE.read_text(encoding="utf-8")
    for name, (file, render) in BLOCKS.items():
        if (RESULTS / file).exists():
            page = fill(page, name, render(document.read(RESULTS / file)))
            print(f"{name}: filled from {RESULTS / file}")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
