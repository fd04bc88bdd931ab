"""``Select``: each mode's value and gradient, and that labels get in nowhere but in a training step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arena.selection import HARD, Mode, Select, choosing, supervise, training_step

SCORES = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.1, 0.2]])
TABLE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def select(mode: Mode, scores=SCORES, table=TABLE):
    module = Select()
    module.mode = mode
    return module(scores, table)


def test_hard_is_the_argmax_without_gradient_to_the_scores():
    scores, table = SCORES.clone().requires_grad_(), TABLE.clone().requires_grad_()
    out = select(HARD, scores, table)
    assert torch.equal(out, TABLE[[1, 0]])
    out.sum().backward()
    assert scores.grad is None
    assert table.grad.tolist() == [[1, 1], [1, 1], [0, 0]]


def test_soft_is_the_mixture_and_reaches_the_scores():
    scores = SCORES.clone().requires_grad_()
    out = select(Mode("soft", 0.7), scores)
    torch.testing.assert_close(out, torch.softmax(SCORES / 0.7, 1) @ TABLE)
    out[:, 0].sum().backward()
    assert (scores.grad.abs().sum(1) > 0).all()


@given(st.integers(0, 2**32), st.sampled_from(((3,), (2, 3), (2, 1, 1))))
@settings(deadline=None)
def test_straight_through_is_hard_forward_and_soft_backward(seed, rest):
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(4, 5, generator=generator) * 3).requires_grad_()
    table = torch.randn(5, *rest, generator=generator)
    direction = torch.randn(4, *rest, generator=generator)
    straight, soft = select(Mode("straight_through", 2.0), scores, table), select(Mode("soft", 2.0), scores, table)
    assert torch.equal(straight, select(HARD, scores, table))
    (got,) = torch.autograd.grad((straight * direction).sum(), scores)
    (expected,) = torch.autograd.grad((soft * direction).sum(), scores)
    torch.testing.assert_close(got, expected)


def test_cold_softness_approaches_the_hard_choice():
    torch.testing.assert_close(select(Mode("soft", 0.01)), select(HARD))


def test_forced_takes_the_given_class():
    assert torch.equal(select(Mode("forced", classes=torch.tensor([2, 1]))), TABLE[[2, 1]])
    with pytest.raises(ValueError, match="needs the class of each row"):
        select(Mode("forced"))


def test_temperature_and_class_by_row_follow_the_rows():
    mode = Mode("soft", torch.tensor([0.5, 2.0]), torch.tensor([1, 2]))
    both = select(mode)
    for i in range(2):
        index = torch.tensor([i])
        assert torch.allclose(select(mode.rows(index), SCORES[index]), both[index])
        assert mode.rows(index).classes.tolist() == [i + 1]
    assert HARD.rows(torch.tensor([0])) == HARD


def test_unknown_mode():
    with pytest.raises(ValueError, match="unknown mode 'medium'"):
        select(Mode("medium"))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Select(), Select()

    def forward(self, scores):
        return self.first(scores, TABLE), self.second(scores, TABLE * 10)


def test_supervise_chooses_by_the_label_everywhere_and_only_inside():
    model, y = Masked(), torch.tensor([2, 2])
    with training_step(), supervise(model, y):
        first, second = model(SCORES)
    assert torch.equal(first, TABLE[[2, 2]])
    assert torch.equal(second, TABLE[[2, 2]] * 10)
    assert torch.equal(model(SCORES)[0], TABLE[[1, 0]])


def test_supervise_is_refused_outside_a_training_step():
    model = Masked()
    with pytest.raises(RuntimeError, match="only inside a training step"), supervise(model, torch.tensor([0, 0])):
        pass
    with training_step():
        pass
    with pytest.raises(RuntimeError, match="only inside a training step"), supervise(model, torch.tensor([0, 0])):
        pass


def test_labels_left_behind_are_refused():
    model = Masked()
    model.first.labels = torch.tensor([0, 0])
    with pytest.raises(RuntimeError, match="labels reached a model outside a training step"):
        model(SCORES)


def test_number_of_labels_must_match():
    with (
        training_step(),
        supervise(model := Masked(), torch.tensor([0])),
        pytest.raises(RuntimeError, match="1 labels for 2 examples"),
    ):
        model(SCORES)


def test_an_error_inside_takes_labels_and_modes_back():
    model = Masked()
    with pytest.raises(KeyError), training_step(), supervise(model, torch.tensor([0, 0])):
        raise KeyError
    assert model.first.labels is None
    with pytest.raises(KeyError), choosing({"a": model.first}, {"a": Mode("soft")}):
        raise KeyError
    assert model.first.mode == HARD


def test_choosing_sets_the_named_ones_for_the_duration():
    model = Masked()
    with choosing({"a": model.first, "b": model.second}, {"a": Mode("forced", classes=torch.tensor([2, 2]))}):
        assert torch.equal(model(SCORES)[0], TABLE[[2, 2]])
        assert torch.equal(model(SCORES)[1], TABLE[[1, 0]] * 10)
    assert torch.equal(model(SCORES)[0], TABLE[[1, 0]])


def test_choosing_a_name_that_is_not_there_changes_nothing():
    model = Masked()
    with pytest.raises(KeyError), choosing({"a": model.first}, {"a": Mode("soft"), "z": Mode("soft")}):
        pass
    assert model.first.mode == HARD
