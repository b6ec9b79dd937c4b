"""On a CPU a start tests, measures and records nothing, but a profile run works."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adapters_store.base.description import BaseDescription, LinearShape
from adapters_store.base.families import FAMILIES, UnsupportedBase
from server.engine.model.base_model import BaseModel, load_base
from server.engine.schedule import SchedulerSettings
from server.engine.startup.gpu_start import (
    GRAPH_BYTES,
    GpuStart,
    attention_modules,
    check_step_size,
    default_step,
    graph_bytes,
    prepare,
    profile_run,
)
from server.engine.startup.memory_plan import GIB, Reserved
from server.engine.startup.settings import MIB, EngineSettings


@pytest.fixture(scope="module")
def model(base: Path) -> BaseModel:
    return load_base(base, dtype="float32")


def test_nothing_is_prepared_without_a_gpu(model: BaseModel, base: Path) -> None:
    reported: list[str] = []
    start = prepare(model, EngineSettings(base=base), max_context=64, report_progress=reported.append)
    assert start == GpuStart(reserved=Reserved(), graphs=None)
    assert reported == []


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_a_profile_run_runs_steps_of_the_size_it_is_given(
    model: BaseModel, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    forward = type(model.model).forward

    def counted(self: object, *args: object, **options: object) -> object:
        seen.append((options["input_ids"].shape[1], model.lora.layers is not None))  # type: ignore[attr-defined]
        return forward(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.model), "forward", counted)
    assert profile_run(model, num_tokens=num_tokens, num_rows=4, block_size=16) == Reserved()
    ranks, forms = 3, 2  # LoRA alone, and with int8 or DoRA
    assert seen == [(num_tokens, False), *[(num_tokens, True)] * ranks * forms]


def test_the_reserve_of_recordings_counts_their_logits_once_for_all() -> None:
    """Twice one step's: as the head leaves them, and where every recording writes its own."""
    few, many = (graph_bytes(num_graphs=count, forward_bytes=0, logits_bytes=66 * MIB) for count in (33, 105))
    without = graph_bytes(num_graphs=33, forward_bytes=0, logits_bytes=0)
    assert few - without == 2 * 66 * MIB
    assert many - few == (105 - 33) * GRAPH_BYTES
    assert graph_bytes(num_graphs=0, forward_bytes=9, logits_bytes=9) == 0


@pytest.mark.parametrize("architecture", FAMILIES)
def test_recordings_for_few_modules_are_those_of_q_k_v_and_of_attention(architecture: str) -> None:
    groups = tuple(FAMILIES[architecture].groups(2))
    names = [path for group in groups for path in group]
    modules = dict.fromkeys(names, LinearShape(8, 8))
    base = BaseDescription("sha256:0", "b", architecture, "bfloat16", modules, groups)
    inputs, attention = ([names[index] for index in sorted(chosen)] for chosen in attention_modules(base))
    second = next(index for index, group in enumerate(groups) if index and ".1." in group[0])  # experts are in no group
    assert inputs == [*groups[0], *groups[second]]
    assert attention == [*groups[0], *groups[1], *groups[second], *groups[second + 1]]


@pytest.mark.parametrize(("gib", "step"), [(None, (512, 64)), (24, (2048, 64)), (80, (8192, 256)), (141, (8192, 256))])
def test_a_large_gpu_takes_large_steps_unless_the_operator_says_otherwise(
    gib: int | None, step: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = SimpleNamespace(total_memory=(gib or 0) * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: size)
    default = default_step(torch.device("cpu" if gib is None else "cuda"))
    assert (default.tokens, default.rows) == step
    assert default.drafts == (7 if gib is None else 0), "recorded steps guess nothing"

    def sizes(**given: int) -> tuple[int, int]:
        settings = SchedulerSettings(**given).with_defaults(default)
        return settings.tokens_per_step, settings.running_slots

    assert sizes() == step
    assert sizes(max_batch_tokens=300, max_running=7) == (300, 7)
    assert sizes(max_batch_tokens=40) == (40, 40), "no more rows than tokens"
    assert sizes(max_running=9000) == (9000, 9000), "no fewer tokens than rows"


def test_a_step_that_no_launch_can_take_is_refused_with_option_value_and_limit() -> None:
    check_step_size(torch.device("cuda"), 65_535)
    check_step_size(torch.device("cpu"), 70_000)
    with pytest.raises(UnsupportedBase, match=r"--max-batch-tokens must be at most 65,535 on a GPU, got 65,536"):
        check_step_size(torch.device("cuda"), 65_536)
