"""Counter-based random numbers: the published Philox vectors, and independence of whatever shares a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arena.rng import Stream, philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    words = tuple(torch.tensor([w], dtype=torch.int64) for w in counter)
    assert " ".join(f"{w:08x}" for w in philox(words, key)[0].tolist()) == expected


def reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers."""
    for r in range(10):
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        k = [(key[0] + r * 0x9E3779B9) & ONES, (key[1] + r * 0xBB67AE85) & ONES]
        counter = [(p1 >> 32) ^ counter[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ counter[3] ^ k[1], p0 & ONES]
    return counter


@given(st.lists(st.integers(0, ONES), min_size=6, max_size=6))
@settings(deadline=None)
def test_tensor_arithmetic_equals_exact_integers(words):
    counter = tuple(torch.tensor([w], dtype=torch.int64) for w in words[:4])
    assert philox(counter, (words[4], words[5]))[0].tolist() == reference(words[:4], words[4:])


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=9, unique=True), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_a_row_does_not_depend_on_its_batch(rows, shuffler):
    stream = Stream.of(0, "pgd")
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    index = torch.tensor(rows)
    together = stream.uniform(index, 3, (2, 3))
    assert torch.equal(stream.uniform(index[order], 3, (2, 3)), together[order])
    for i in range(len(rows)):
        assert torch.equal(stream.uniform(index[i : i + 1], 3, (2, 3)), together[i : i + 1])


def test_step_and_restart_may_differ_by_row():
    stream, rows = Stream.of(5, "square"), torch.tensor([4, 4, 9])
    steps, restarts = torch.tensor([0, 7, 2]), torch.tensor([1, 0, 3])
    mixed = stream.uniform(rows, steps, (5,), restart=restarts)
    for i in range(3):
        alone = stream.uniform(rows[i : i + 1], int(steps[i]), (5,), restart=int(restarts[i]))
        assert torch.equal(mixed[i : i + 1], alone)


def test_rows_that_are_drawn_in_parts_are_those_drawn_alone():
    stream, rows = Stream.of(0, "pgd"), torch.arange(50) * 7
    steps, restarts = rows % 3, rows % 5
    together = stream.uniform(rows, steps, (3, 32, 32), restart=restarts)
    for i in range(len(rows)):
        alone = stream.uniform(rows[i : i + 1], int(steps[i]), (3, 32, 32), restart=int(restarts[i]))
        assert torch.equal(together[i : i + 1], alone)


def test_longer_draws_begin_with_shorter_ones():
    stream, rows = Stream.of(0, "pgd"), torch.arange(3)
    assert torch.equal(stream.bits(rows, 0, 0, 13)[:, :6], stream.bits(rows, 0, 0, 6))


def test_every_coordinate_of_the_key_and_counter_matters():
    rows = torch.tensor([10])
    base = Stream.of(0, "pgd").uniform(rows, 0, (8,))
    others = [
        Stream.of(1, "pgd").uniform(rows, 0, (8,)),
        Stream.of(-1, "pgd").uniform(rows, 0, (8,)),
        Stream.of(0, "pgd(steps=5)").uniform(rows, 0, (8,)),
        Stream.of(0, "pgd").uniform(rows + 1, 0, (8,)),
        Stream.of(0, "pgd").uniform(rows, 1, (8,)),
        Stream.of(0, "pgd").uniform(rows, 0, (8,), restart=1),
    ]
    for other in others:
        assert (base != other).all()
    assert torch.equal(base, Stream.of(0, "pgd").uniform(rows, 0, (8,)))


def test_seed_and_name_do_not_run_into_each_other():
    assert Stream.of(1, "1pgd").key != Stream.of(11, "pgd").key


def test_uniform_moments_and_range():
    u = Stream.of(0, "moments").uniform(torch.arange(2000), 0, (10, 10)).double()
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 1 / 2) < 0.003  # 200,000 draws: standard error 0.0006
    assert abs(u.var() - 1 / 12) < 0.002
    rows = u.flatten(1)
    assert abs(torch.corrcoef(torch.stack((rows[:-1].flatten(), rows[1:].flatten())))[0, 1]) < 0.015
    assert abs(torch.corrcoef(torch.stack((rows[:, :-1].flatten(), rows[:, 1:].flatten())))[0, 1]) < 0.015
    counts = torch.histc(u, bins=20, min=0, max=1)
    assert ((counts - 10_000).abs() < 600).all()  # six standard deviations


def test_normal_moments():
    z = Stream.of(0, "moments").normal(torch.arange(2000), 0, (100,)).double()
    assert abs(z.mean()) < 0.015
    assert abs(z.std() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.15
    assert z.isfinite().all()


def test_shapes_and_types():
    stream, rows = Stream.of(0, "pgd"), torch.arange(2)
    for shape in ((1,), (3,), (3, 5, 7), (1, 1, 1)):
        for draw in (stream.uniform, stream.normal):
            made = draw(rows, 0, shape)
            assert made.shape == (2, *shape)
            assert made.dtype == torch.float32
