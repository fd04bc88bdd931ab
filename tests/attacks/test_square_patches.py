import pytest
import torch
from arena_attacks.square_patches import BEYOND, Patches

from arena.threat import Threat


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 3, 4), 1), ((2, 3, 4), 2), ((2, 3, 4), 3), ((1, 5, 2), 2), ((6, 2, 2), 1), ((3, 1, 4), 1)]
)
def test_idle_squares_are_those_that_change_no_pixel(shape, size):
    threat, (channels, height, width) = Threat.parse("Linf", "0.1"), shape
    patches, generator = Patches(shape), torch.Generator().manual_seed(1)
    x = torch.rand(7, *shape, generator=generator).mul(1.2).sub(0.1).clamp(0, 1)
    # most pixels at one edge: some squares then change nothing
    signs = (torch.rand(7, *shape, generator=generator) < 0.85).float() * 2 - 1
    point = threat.project(x, x + signs * BEYOND)
    found = patches.idle(threat, x, point, size)
    table = patches.table(size).float()
    assert table.shape == (patches.count, height + channels * width)
    idle = 0
    for number in range(patches.count):
        top, left = divmod(number // patches.signs, width)
        if top + size > height or left + size > width:
            assert found[:, number].all()
            continue
        push = table[number]
        pushed = point + push[:height].view(1, height, 1) * push[height:].view(channels, 1, width)
        assert ((pushed - point) != 0).sum() == 7 * channels * size**2
        same = (threat.project(x, pushed) == point).flatten(1).all(1)
        assert torch.equal(found[:, number], same)
        idle += int(same.sum())
    assert idle > 0


def test_numbers_name_the_squares_of_the_table():
    patches = Patches((3, 4, 5))
    generator = torch.Generator().manual_seed(2)
    top, left = (torch.randint(0, most, (50,), generator=generator) for most in (3, 4))
    coins, size = torch.randint(0, 2, (50, 3), generator=generator), torch.full((50,), 2)
    numbers = patches.numbers(top, left, coins)
    assert len(numbers.unique()) > 30
    assert numbers.max() < patches.count
    assert torch.equal(patches.table(2)[numbers], patches.pushes(top, left, coins, size))
