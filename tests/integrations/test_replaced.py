"""Replacements act on one object, leave nothing behind, and are all made or none."""

from __future__ import annotations

import pytest
from torch import nn

from distil_fast.integrations import HostChangedError, Replaced
from distil_fast.integrations.replaced import expect_parameters


class Host:
    scale = 1

    def __init__(self) -> None:
        self.loss = "theirs"

    def compute(self) -> str:
        return "theirs"


def test_undo_leaves_nothing_behind() -> None:
    host, other = Host(), Host()
    before = dict(vars(host))
    replaced = Replaced(host, loss="ours", compute=lambda: "ours", scale=2)
    assert (host.loss, host.compute(), host.scale) == ("ours", "ours", 2)
    assert (other.loss, other.compute(), other.scale) == ("theirs", "theirs", 1)
    replaced.undo()
    assert vars(host) == before
    host.loss = "changed since"
    replaced.undo()
    assert host.loss == "changed since"


def test_a_with_block_puts_back_after_an_error() -> None:
    host = Host()
    with pytest.raises(ValueError, match="boom"), Replaced(host, compute=lambda: "ours"):
        raise ValueError("boom")
    assert host.compute() == "theirs"


def test_children_of_a_module_are_put_back_as_children() -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = nn.MSELoss()

    host = Criterion()
    own = host.loss
    with Replaced(host, loss=nn.L1Loss()):
        assert isinstance(host._modules["loss"], nn.L1Loss)
    assert host._modules["loss"] is own


def test_nothing_is_replaced_when_one_is_missing() -> None:
    host = Host()
    with pytest.raises(HostChangedError, match="Host: expected an attribute 'gone'"):
        Replaced(host, loss="ours", gone=1)
    assert host.loss == "theirs"


def test_parameters_are_expected_by_name() -> None:
    def host_loss(student_logits: float, teacher_logits: float) -> float:
        return student_logits - teacher_logits

    expect_parameters(host_loss, ("teacher_logits", "student_logits"), "host 1.0")
    with pytest.raises(HostChangedError, match=r"host 1\.0: expected .*host_loss to take beta, and it takes"):
        expect_parameters(host_loss, ("student_logits", "beta"), "host 1.0")
