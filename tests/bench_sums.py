"""What a result of `bench throughput` has to add up to."""

from typing import Any

import pytest


def check_sums(document: dict[str, Any], table: str, hosts: list[str], ranks: int) -> None:
    """Ranks add up to nodes, nodes to what the steps of metrics.jsonl say, and all of them stand in the table."""
    (record,) = document["records"]
    assert record["outcome"] == "ok", record
    assert [rank["rank"] for rank in record["ranks"]] == list(range(ranks))
    assert sorted(node["host"] for node in record["nodes"]) == hosts
    for node in record["nodes"]:
        own = [rank for rank in record["ranks"] if rank["host"] == node["host"]]
        assert [rank["rank"] for rank in own] == node["ranks"]
        assert sum(rank["tokens_per_second"] for rank in own) == pytest.approx(node["tokens_per_second"], rel=1e-12)
    # metrics.jsonl's figures, as rank 0 wrote them, are from the global batch; the ranks' from what each was dealt.
    total = record["mean_tokens_per_second"]
    assert sum(node["tokens_per_second"] for node in record["nodes"]) == pytest.approx(total, rel=1e-9)
    low, high = record["tokens_per_second_spread"]
    assert low <= total <= high
    for row in [*record["nodes"], *record["ranks"]]:
        assert f"| {row['tokens_per_second']:,.1f} |" in table
    assert all(rank["peak_gib"] > 0.05 for rank in record["ranks"])
