"""Random lives of a scheduler: hypothesis finds and shrinks, seeded runs cover ground. Every page and token is checked (see World)."""

import random

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scheduler_world import World

from novajax.scheduler.budget import Shapes

SHAPES = [
    Shapes(decode=(1, 2, 4), prefill=((1, 8), (2, 4), (1, 2)), score=(1, 3), step_tokens=16, drafts=((1, 7), (2, 3), (4, 3))),
    Shapes(decode=(0, 4), prefill=((1, 5),), score=None, step_tokens=9),
    Shapes(decode=(2, 4), prefill=((3, 4), (1, 16)), score=(1, 4), step_tokens=20, drafts=((2, 4),)),
    Shapes(decode=(4,), prefill=((2, 8),), score=(2, 8), step_tokens=20, fixed=True),
    Shapes(decode=(4,), prefill=((1, 6),), score=None, step_tokens=10, fixed=True),
]
STEMS = [tuple(random.Random(i).randrange(3, 40) for _ in range(24)) for i in range(3)]


def make_world(*, slots: int, stages: int, **kwargs) -> World:
    """With more slots than decode rows only where the stages share them, and with guesses only where there are none."""
    shapes = kwargs.pop("shapes")
    shapes = msgspec.structs.replace(shapes, drafts=()) if stages > 1 else shapes
    return World(slots=min(slots, 4 * stages), stages=stages, shapes=shapes, **kwargs)


worlds = st.builds(
    make_world,
    pages=st.integers(3, 20),
    page_tokens=st.integers(1, 5),
    slots=st.integers(1, 6),
    partitions=st.sampled_from([1, 1, 2, 3]),
    stages=st.sampled_from([1, 1, 2, 3, 4]),
    in_flight=st.integers(1, 3),
    context=st.integers(8, 48),
    shapes=st.sampled_from(SHAPES),
    prefix_cache=st.sampled_from([True, True, False]),
    max_waiting=st.integers(1, 6),
    max_waiting_tokens=st.integers(20, 80),
    age_plans=st.integers(1, 40),
)
prompts = st.tuples(st.sampled_from(STEMS), st.integers(0, 24), st.lists(st.integers(0, 39), max_size=4)).map(
    lambda t: (*t[0][: t[1]], *t[2])
)
requests = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "priority": st.sampled_from(["high", "medium", "low"]),
        "salt": st.sampled_from(["", "", "tenant"]),
        "adapter": st.sampled_from(["", "", "lora"]),
        "max_tokens": st.one_of(st.none(), st.integers(0, 30)),
        "min_tokens": st.sampled_from([0, 0, 1, 4]),
        "stop_token_ids": st.sampled_from([(), (7,), tuple(range(3, 12))]),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([None, 0, 2]),
        "prompt_logprobs": st.sampled_from([None, None, None, 1]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.0]),
        "logit_bias": st.sampled_from([{}, {}, {5: 1.0}]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(world=worlds)
    def begin(self, world):
        self.world = world

    @rule(request=requests)
    def add(self, request):
        self.world.add(**request)

    @rule(request=requests, count=st.integers(2, 4))
    def add_some(self, request, count):
        for _ in range(count):
            self.world.add(**request)

    @rule(data=st.data())
    def abort(self, data):
        if self.world.answers:
            self.world.abort(data.draw(st.sampled_from(sorted(self.world.answers))))

    @rule(data=st.data())
    def fail(self, data):
        if self.world.answers:
            self.world.fail(data.draw(st.sampled_from(sorted(self.world.answers))))

    @rule(count=st.integers(1, 3))
    def dispatch(self, count):
        for _ in range(count):
            self.world.dispatch()

    @rule(count=st.integers(1, 3))
    def collect(self, count):
        for _ in range(count):
            self.world.collect()

    @rule(count=st.integers(1, 20))
    def steps(self, count):
        for _ in range(count):
            self.world.dispatch()
            self.world.collect()

    @invariant()
    def sound(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.run()


quick = settings(max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SchedulerMachine.TestCase.settings = quick
TestMachine = SchedulerMachine.TestCase


def random_life(seed: int, steps: int) -> World:
    """One life drawn from `seed`, harsher than hypothesis has patience for."""
    rng = random.Random(seed)
    world = make_world(
        pages=rng.randint(3, 24),
        page_tokens=rng.randint(1, 5),
        slots=rng.randint(1, 6),
        partitions=rng.choice([1, 1, 2, 3]),
        stages=rng.choice([1, 1, 2, 3, 4]),
        in_flight=rng.randint(1, 3),
        context=rng.randint(8, 60),
        shapes=rng.choice(SHAPES),
        prefix_cache=rng.random() < 0.8,
        max_waiting=rng.randint(1, 8),
        max_waiting_tokens=rng.randint(20, 120),
        age_plans=rng.randint(1, 60),
    )
    arrival, trouble = rng.choice([0.1, 0.4, 0.8]), rng.choice([0.0, 0.02, 0.1])
    for _ in range(steps):
        if rng.random() < arrival:
            said = rng.choice([*world.answers.values()]) if world.answers and rng.random() < 0.3 else None  # a conversation goes on
            stem = rng.choice(STEMS)[: rng.randint(0, 24)] if said is None else (*said.request.prompt, *said.got)
            world.add(
                (*stem, *(rng.randrange(40) for _ in range(rng.randint(0, 4)))),
                priority=rng.choice(["high", "medium", "low"]),
                salt=rng.choice(["", "", "tenant"]),
                max_tokens=rng.choice([None, 0, 1, 5, 12, 30]),
                min_tokens=rng.choice([0, 0, 1, 3]),
                stop_token_ids=rng.choice([(), (7,), tuple(range(3, 9))]),
                ignore_eos=rng.random() < 0.5,
                logprobs=rng.choice([None, 1]),
                prompt_logprobs=rng.choice([None, None, None, 0]),
                presence_penalty=rng.choice([0.0, 0.0, 0.5]),
                logit_bias=rng.choice([{}, {}, {4: 1.0}]),
            )
        live = world.live()
        if live and rng.random() < trouble:
            (world.abort if rng.random() < 0.8 else world.fail)(rng.choice(live))
        for _ in range(rng.randint(0, 2)):
            world.dispatch()
        for _ in range(rng.randint(0, 2)):
            world.collect()
        if rng.random() < 0.05:
            world.check()
    world.run()
    return world


def test_random_lives():
    preemptions = hits = finished = refused = bubbles = drafted = accepted = 0
    for seed in range(850):
        world = random_life(seed, 200)
        stats = world.scheduler.stats()
        preemptions += stats["preemptions"]
        hits += stats["prefix_hit_tokens"]
        finished += len(world.answers)
        refused += world.refused
        drafted += stats["drafted_tokens"]
        accepted += stats["accepted_tokens"]
        bubbles += sum(plan.bubble for plan in world.plans)
    # The lives are only worth something if they were hard: these are far below what happens.
    assert preemptions > 100
    assert hits > 1000
    assert finished > 1000
    assert refused > 100
    assert bubbles > 1000
    assert 1000 < accepted < drafted - 1000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_random_lives():
    for seed in range(1000, 11_000):
        random_life(seed, 300)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_machine_at_length():
    from hypothesis.stateful import run_state_machine_as_test

    long = settings(quick, max_examples=10_000, stateful_step_count=50)
    run_state_machine_as_test(SchedulerMachine, settings=long)
