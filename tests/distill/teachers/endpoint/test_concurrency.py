"""The number of requests at once against simulated servers, on a clock of the test's own."""

from __future__ import annotations

import random

import pytest

from deepdistill.distill.teachers.endpoint.concurrency import AdaptiveConcurrency, RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedServer:
    """Answers `capacity` requests at once, 5 a second each, 10 tokens an answer; more are refused, or only queue."""

    def __init__(self, capacity: int, refuses: bool = True, faulty: float = 0.0) -> None:
        self.capacity, self.refuses, self.faulty, self.rng = capacity, refuses, faulty, random.Random(0)
        self.n_answered = self.n_refused = 0

    def serve(self, concurrency: AdaptiveConcurrency, seconds: float) -> None:
        for _ in range(self.whole(min(concurrency.level, self.capacity) * 5 * seconds)):
            if self.rng.random() < self.faulty:
                concurrency.pushed_back()
                continue
            concurrency.accepted()
            for _ in range(10):
                concurrency.heard(1)
            self.n_answered += 1
        for _ in range(self.whole(max(0, concurrency.level - self.capacity) * 2 * seconds) if self.refuses else 0):
            concurrency.pushed_back()
            self.n_refused += 1

    def whole(self, number: float) -> int:
        return int(number) + (self.rng.random() < number % 1)


def levels_over(server: SimulatedServer, seconds: float) -> list[int]:
    clock = Clock()
    concurrency, levels = AdaptiveConcurrency(clock=clock), []
    while clock.now < seconds:
        clock.now += 0.25
        server.serve(concurrency, 0.25)
        concurrency.look(concurrency.level, was_full=True)
        levels.append(concurrency.level)
    return levels


@pytest.mark.parametrize("capacity", [1, 2, 8, 32, 200])
def test_it_finds_what_a_server_takes(capacity: int) -> None:
    server = SimulatedServer(capacity)
    levels = levels_over(server, 200)
    late = levels[len(levels) // 2 :]
    assert capacity * 0.75 <= sum(late) / len(late) <= max(capacity * 1.2, capacity + 1)
    assert server.n_answered > 0.75 * capacity * 5 * 200
    assert server.n_refused < 0.15 * server.n_answered


def test_what_brings_nothing_is_not_kept_though_nobody_refuses_it() -> None:
    late = levels_over(SimulatedServer(48, refuses=False), 200)[200:]
    assert min(late) >= 32
    assert sum(late) / len(late) <= 96
    assert max(late) <= 160


def test_errors_that_do_not_come_from_the_load_do_not_hold_it_down() -> None:
    server = SimulatedServer(200, faulty=0.2)
    levels = levels_over(server, 200)
    assert min(levels[400:]) >= 90
    assert server.n_answered > 0.5 * 0.8 * 200 * 5 * 200


def test_it_follows_a_server_that_takes_less_than_before() -> None:
    server, clock = SimulatedServer(64), Clock()
    concurrency, levels = AdaptiveConcurrency(clock=clock), []
    for step in range(1200):
        server.capacity = 64 if step < 600 else 10
        clock.now += 0.25
        server.serve(concurrency, 0.25)
        concurrency.look(concurrency.level, was_full=True)
        levels.append(concurrency.level)
    assert max(levels[:600]) >= 60
    assert max(levels[900:]) <= 14


def test_a_fixed_level_stays() -> None:
    concurrency = AdaptiveConcurrency(5)
    for _ in range(100):
        concurrency.pushed_back()
        concurrency.look(5, was_full=True)
    assert concurrency.level == 5


@pytest.mark.parametrize(("n_open", "was_full"), [(3, False), (20, True)], ids=["nobody waits", "more than allowed"])
def test_a_level_that_was_not_kept_says_nothing(n_open: int, was_full: bool) -> None:
    clock = Clock()
    concurrency = AdaptiveConcurrency(clock=clock)
    for _ in range(100):
        clock.now += 0.5
        concurrency.accepted()
        for _ in range(50):
            concurrency.heard(1)
        concurrency.look(n_open, was_full)
    assert concurrency.level == 8


def test_no_more_than_the_limit_in_any_minute() -> None:
    clock = Clock()
    limit, taken = RateLimit(30, clock), []
    while clock.now < 300:
        if limit.wait_s == 0:
            limit.take(1)
            taken.append(clock.now)
        clock.now += 0.125
    assert len(taken) > 140
    assert all(sum(start <= at < start + 60 for at in taken) <= 30 for start in taken)


def test_what_was_taken_less_than_expected_is_free_again() -> None:
    clock = Clock()
    limit = RateLimit(6000, clock)
    limit.take(1000)
    assert limit.wait_s == pytest.approx(10)
    limit.correct(-900)
    assert limit.wait_s == pytest.approx(1)
    unlimited = RateLimit(None, clock)
    unlimited.take(1e9)
    assert unlimited.wait_s == 0
