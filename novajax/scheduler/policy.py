"""The order of things, as functions: who is admitted next, who is senior among the running, who gives way.

Classes are numbers, 0 the highest. Ageing is counted in plans, so that nothing here depends on a clock.
"""

from collections.abc import Sequence as Listed

from novajax.scheduler.sequence import Sequence

CLASSES = {"high": 0, "medium": 1, "low": 2}


def rank(sequence: Sequence, plan_number: int, age_plans: int) -> int:
    """The class a waiting sequence counts as: one better for every `age_plans` plans it has waited, so that low never starves."""
    waited = sequence.waited_plans + plan_number - sequence.queued_at_plan
    return max(0, CLASSES[sequence.request.priority] - waited // age_plans)


def next_waiting(heads: Listed[Sequence], plan_number: int, age_plans: int) -> Sequence:
    """Of the first sequence of each class: the best rank, then the earliest arrival."""
    return min(heads, key=lambda sequence: (rank(sequence, plan_number, age_plans), sequence.number))


def seniority(sequence: Sequence) -> tuple[int, int]:
    """Smaller is more senior. The rank is the one it was admitted with: who aged his way in is not thrown out for his class."""
    return sequence.rank, sequence.number


def victim_for_growth(running: Listed[Sequence], needy: Sequence) -> Sequence | None:
    """Who gives up his pages so that a running sequence can grow: the most junior, if junior to it.

    Taking only from juniors means that the most senior always gets on, so that two sequences never preempt each other in turn.
    """
    last = running[-1]
    return last if seniority(last) > seniority(needy) else None


def victims_for_admission(running: Listed[Sequence], waiting: Sequence) -> list[Sequence]:
    """Who may be preempted to admit `waiting`: those of a strictly lower class, most junior first.

    Its own class counts, not the rank that age gave it: age wins a turn, but does not throw out others of the class, who would
    come back to the head of the queue as the older ones, and so on for ever.
    """
    return [sequence for sequence in reversed(running) if sequence.rank > CLASSES[waiting.request.priority]]
