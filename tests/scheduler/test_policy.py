from novajax.core.types import Priority, Request
from novajax.kv.manager import KVManager
from novajax.scheduler import policy
from novajax.scheduler.sequence import Sequence

KV = KVManager(8, 4, key=b"key")


def sequence(number: int, priority: Priority = "low", queued_at_plan: int = 0) -> Sequence:
    request = Request(id=str(number), prompt=(3, 4), priority=priority)
    one = Sequence(request, number=number, seed=0, max_tokens=4, end_token_ids=(), chain=KV.chain("", ""), arrival_s=0.0)
    one.queued_at_plan = queued_at_plan
    return one


def test_rank_improves_by_one_class_for_each_age_and_no_further_than_high():
    one = sequence(0, queued_at_plan=5)
    assert [policy.rank(one, plan, 10) for plan in (5, 14, 15, 24, 25, 100)] == [2, 2, 1, 1, 0, 0]


def test_only_plans_spent_waiting_count_and_none_is_forgotten_by_a_preemption():
    one = sequence(0)
    lease = KV.lease(one.tokens, one.chain)
    assert lease is not None
    one.admit(0, lease, 2, 12, 0.0)  # waited 12 plans, then ran for 88
    one.vacate()
    KV.release(lease)
    one.queued_at_plan = 100
    assert [policy.rank(one, plan, 20) for plan in (100, 107, 108)] == [2, 2, 1]


def test_the_best_rank_is_next_and_of_equals_the_earlier_arrival():
    low, medium, high = sequence(1), sequence(2, "medium"), sequence(3, "high")
    assert policy.next_waiting([low, medium, high], 0, 10) is high
    assert policy.next_waiting([low, medium], 0, 10) is medium
    assert policy.next_waiting([low, medium, high], 20, 10) is low


def test_a_victim_is_junior_and_for_an_admission_of_a_lower_class():
    running = [sequence(4, "high"), sequence(1, "medium"), sequence(5, "medium")]
    for one in running:
        one.rank = policy.CLASSES[one.request.priority]
    assert running == sorted(running, key=policy.seniority)
    assert policy.victim_for_growth(running, running[0]) is running[2]
    assert policy.victim_for_growth(running, running[2]) is None
    assert policy.victims_for_admission(running, sequence(9, "high")) == [running[2], running[1]]
    assert policy.victims_for_admission(running, sequence(9, "medium")) == []
