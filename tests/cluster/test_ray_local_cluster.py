"""The command that starts its own Ray cluster: what happens when it is killed or interrupted."""

import os
import signal

from tests.cluster.faults import all_gone, family, reached, start_toy, wait_until
from tests.cluster.toys import read_log

# Two of Ray's own helpers; they take a minute to see that their cluster is gone.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def test_a_killed_driver_leaves_nothing_and_the_same_command_goes_on_until_interrupted(tmp_path):
    driver = start_toy("count", tmp_path, "steps=1000")
    wait_until(lambda: reached(tmp_path, 5))
    processes = family(driver)
    agents = [process for process in processes if " ".join(process.cmdline()).strip() in AGENTS]
    others = [process for process in processes if process not in agents]
    assert len(agents) == 2
    assert len(others) > 5
    driver.kill()
    driver.wait()
    wait_until(lambda: all_gone(others), 30)
    last = max(int(words[1]) for words in read_log(tmp_path) if words[0] == "step")

    again = start_toy("count", tmp_path, "steps=1000")
    wait_until(lambda: reached(tmp_path, last + 5))
    assert ["from", "0", str(last)] in read_log(tmp_path)
    processes = family(again)
    os.killpg(again.pid, signal.SIGINT)  # as a terminal does
    out, err = again.communicate(timeout=60)
    assert again.returncode == 130
    assert out.splitlines()[0] == f"rank 0 counts from {last}"
    assert "the same command goes on from the last checkpoint" in err
    assert "Traceback" not in err
    wait_until(lambda: all_gone(processes + agents), 90)
