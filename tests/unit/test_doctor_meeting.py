"""`qlora-dist doctor`: how its ranks meet."""

import threading
import time

from torch.distributed import HashStore

from qlora_dist.cluster.doctor.meeting import Meeting, meet


def test_a_rank_waits_twice_as_long_for_the_meeting_and_for_nothing_after() -> None:
    """Rank 1 of 3 comes at once and rank 2 never: rank 0 says so after the limit, which rank 1 must not run into."""
    store, limit_s = HashStore(), 1.0
    found: dict[int, Meeting] = {}

    def go(rank: int) -> None:
        found[rank] = meet(store, rank, 3, limit_s)

    threads = [threading.Thread(target=go, args=(rank,), daemon=True) for rank in (1, 0)]
    for thread in threads:
        thread.start()
        # Rank 1's own limit is over before rank 0's.
        time.sleep(limit_s / 8)
    for thread in threads:
        thread.join(10)
    assert [found[rank].members for rank in (0, 1)] == [[0, 1], [0, 1]]
    assert [found[rank].limit_s for rank in (0, 1)] == [limit_s, limit_s]
