"""The harness itself: what a rank finds, how it ends, and that none is left behind or waited for in vain."""

import os
import signal
import sys
import time

import pytest
import ranks

pytestmark = pytest.mark.distributed


def tell(words):
    """A main that writes what it finds, and returns the code that it was given."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_X")
    print({name: os.environ.get(name) for name in names}, file=sys.stderr)
    absent = [name for name in ranks.PRELOADED if name not in sys.modules]
    print(f"{len(absent)} to import {absent}, {len(os.listdir('/proc/self/task'))} threads", file=sys.stderr)
    return int(words[0])


def fail_on_the_second(words):
    """A main whose second rank fails, while the first waits for it."""
    if os.environ["RANK"] == "1":
        raise ArithmeticError("rank 1 cannot count")
    time.sleep(float(words[0]))
    return 0


def die(rank):
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_find_what_torchrun_sets(monkeypatch):
    monkeypatch.setenv("ACCELERATE_X", "left behind by a test that trained in this process")
    outcome = ranks.run(tell, [3], processes=2)
    assert outcome.codes == [3, 3] and not outcome.timed_out
    for rank, said in enumerate(outcome.said):
        assert f"'RANK': '{rank}', 'LOCAL_RANK': '{rank}', 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2'" in said
        assert "'MASTER_ADDR': '127.0.0.1'" in said and "'ACCELERATE_X': None" in said


def test_one_process_has_no_launcher_unless_asked():
    assert "'WORLD_SIZE': None" in ranks.run(tell, [0], launched=False).said[0]
    assert "'WORLD_SIZE': '1'" in ranks.run(tell, [0]).said[0]


def test_a_rank_starts_in_no_time_with_everything_imported_and_no_thread_of_its_own():
    ranks.run(tell, [0])
    outcome = ranks.run(tell, [0])
    assert "0 to import [], 1 threads" in outcome.said[0]
    assert outcome.seconds < 5, "8 s and more is what the imports cost"


def test_a_failing_rank_ends_the_others_and_shows_its_traceback():
    outcome = ranks.run(fail_on_the_second, [60], processes=2, grace=0.5)
    assert outcome.codes == [-signal.SIGKILL, 1] and outcome.seconds < 10 and not outcome.timed_out
    assert "ArithmeticError: rank 1 cannot count" in outcome.said[1] and "Traceback" in str(outcome)


def test_the_others_may_end_by_themselves():
    assert ranks.run(fail_on_the_second, [0.5], processes=2).codes == [0, 1]


def test_a_rank_that_hangs_is_killed():
    outcome = ranks.run(fail_on_the_second, [60], processes=1, timeout=1)
    assert outcome.codes == [-signal.SIGKILL] and outcome.timed_out and outcome.seconds < 10


def test_a_killed_rank_is_seen():
    assert ranks.run(tell, [0], prepare=die).codes == [-signal.SIGKILL]


def test_no_rank_outlives_its_context():
    with ranks.Ranks(fail_on_the_second, [60]) as started:
        pid = started.processes[0].pid
        assert started.processes[0].is_alive()
    assert not started.processes[0].is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
