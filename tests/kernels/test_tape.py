"""A tape does again what a function did, on what its inputs hold now; what cannot be done again is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_kernels.elementwise.launcher import add_rms_norm, forbid_tokens, rms_norm, silu_mul
from lora_kernels.native.bindings import native_ops
from lora_kernels.native.tape import NotRecordable, Tape, TapeMemory

pytestmark = pytest.mark.skipif(native_ops(torch.float32) is None, reason="no C compiler")

Function = Callable[[torch.Tensor], torch.Tensor]
WEIGHT = torch.linspace(0.5, 1.5, 32)


def layer(x: torch.Tensor) -> torch.Tensor:
    """Kernels, torch's functions, one of them in place, and views."""
    total, normed = add_rms_norm(x, x.flip(0), WEIGHT, 1e-5)
    scaled = normed.cos().mul_(3.0)
    return silu_mul(torch.cat([scaled, total], dim=-1)).view(-1, 32)[1:] + 1.0


@torch.inference_mode()
def recorded(function: Function, x: torch.Tensor, memory: TapeMemory | None = None) -> Tape:
    return Tape(lambda: function(x), memory or TapeMemory(), [x, WEIGHT])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_reads_what_its_inputs_hold_now(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "WEIGHT", WEIGHT.to(dtype))
    x = torch.randn(3, 32).to(dtype)
    tape = recorded(layer, x)
    assert tape.num_kernels == 2
    for _ in range(3):
        x.copy_(torch.randn(3, 32))
        assert torch.equal(tape.replay(), layer(x))


@torch.inference_mode()
def test_tapes_share_their_memory_and_do_not_disturb_each_other() -> None:
    memory = TapeMemory()
    inputs = [torch.randn(3, 32) for _ in range(6)]
    first = recorded(layer, inputs[0], memory)
    size = memory.num_bytes
    tapes = [first, *(recorded(layer, x, memory) for x in inputs[1:])]
    assert memory.num_bytes == size
    assert memory.num_live == 0
    for x, tape in [*zip(inputs, tapes, strict=True)] * 2:
        assert torch.equal(tape.replay(), layer(x))


@torch.inference_mode()
def test_memory_of_a_tensor_that_died_is_used_again_within_a_function() -> None:
    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            x = rms_norm(x, WEIGHT, 1e-5)
        return x

    memory = TapeMemory()
    x = torch.randn(64, 32)
    tape = recorded(deep, x, memory)
    assert memory.num_bytes <= 2 * x.nbytes
    x.mul_(2.0).add_(1.0)
    assert torch.equal(tape.replay(), deep(x))


@torch.inference_mode()
@pytest.mark.parametrize("numbers", [range(2, 130), range(129, 1, -1)])
def test_tapes_of_all_numbers_of_rows_hold_little_more_than_the_largest(numbers: range) -> None:
    alone, memory = TapeMemory(), TapeMemory()
    recorded(layer, torch.randn(max(numbers), 32), alone)
    for rows in numbers:
        recorded(layer, torch.randn(rows, 32), memory)
    assert memory.num_bytes <= 4 * alone.num_bytes


KEPT: list[torch.Tensor] = []
ELSEWHERE = torch.randn(3, 32)


def keeps_a_tensor(x: torch.Tensor) -> torch.Tensor:
    KEPT.append(x + 1.0)
    return x + 2.0


def forbids(x: torch.Tensor) -> torch.Tensor:
    y, nothing = x + 1.0, x[:1] * 0.0
    forbid_tokens(y, nothing[0, :1].long(), nothing.to(torch.uint8))
    return y


@torch.inference_mode()
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x[x > 0], "depends on their values"),
        (lambda x: x + x.sum().item(), "more than tensors"),
        (lambda x: x + torch.rand_like(x), "depends on their values"),
        (lambda x: x + torch.ones(3, 32), "reads no tensor"),
        (lambda x: x + ELSEWHERE, "not known to last"),
        (lambda x: x.add_(1.0), "did not make"),
        (lambda x: x[:2], "none of the tensors that it made"),
        (keeps_a_tensor, "1 of its tensors outlive it"),
        (forbids, "cannot be replayed"),
    ],
)
def test_what_cannot_be_done_again_is_refused(function: Function, reason: str) -> None:
    with pytest.raises(NotRecordable, match=reason):
        recorded(function, torch.randn(3, 32))
    x = torch.randn(3, 32)
    tape = recorded(layer, x)  # and nothing is left behind
    assert torch.equal(tape.replay(), layer(x))
