from __future__ import annotations

from cpift.cluster.work_queue import Outcome, WorkItem, WorkQueue


def queue(*failures: int) -> WorkQueue:
    made = WorkQueue()
    made.put(WorkItem(f"t{n}", str(n).encode(), survives) for n, survives in enumerate(failures))
    return made


def test_each_piece_goes_to_one_worker_in_order() -> None:
    made = queue(0, 0)
    assert [made.take("a"), made.take("b"), made.take("c")] == [b"0", b"1", None]
    made.finish("b", Outcome("scores"))
    assert made.outcomes() == {"t1": Outcome("scores")}
    assert made.outcomes() == {}
    assert made.holders == ["a"]


def test_what_a_lost_worker_held_is_next_until_it_has_failed_too_often() -> None:
    made = queue(1, 0)
    assert made.take("a") == b"0"
    made.lose("a", "killed")
    assert made.take("b") == b"0"
    made.lose("b", "killed again")
    assert made.outcomes() == {"t0": Outcome(failure="killed again")}
    assert made.take("b") == b"1"


def test_workers_that_hold_nothing_change_nothing() -> None:
    made = queue(0)
    made.lose("a", "idle")
    made.finish("a", Outcome())
    assert made.outcomes() == {}
    assert made.take("a") == b"0"
    made.lose("a", "killed")
    made.finish("a", Outcome("from a process that was given up"))
    assert made.outcomes() == {"t0": Outcome(failure="killed")}
