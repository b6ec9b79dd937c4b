"""What is recommended, and that its reasons carry the figures that decided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trainer.planner.gpus import GPUS
from trainer.planner.recommend import RANKS, TASKS, Question, recommend
from trainer.planner.shapes import KNOWN_SHAPES, PlanError
from trainer.spec import TrainSpec

EIGHT_B = KNOWN_SHAPES["llama-3.1-8b"]
QUESTION = Question(shape=EIGHT_B, task="style", examples=1000, gpu=GPUS["h100"])


def reasons(question: Question) -> str:
    return "\n".join(recommend(question).reasons)


def test_a_small_change_takes_a_small_adapter() -> None:
    chosen = recommend(QUESTION)
    assert chosen.case.method == "lora"
    assert chosen.case.rank == 8


def test_more_data_takes_a_higher_rank_until_it_fits() -> None:
    ranks = [recommend(replace(QUESTION, examples=count)).case.rank for count in (1000, 200_000, 1_000_000, 2_000_000)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]
    chosen = recommend(replace(QUESTION, examples=200_000))
    assert chosen.case.trained_parameters >= 200_000 * 512 // 4


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_least_rank(task: str) -> None:
    assert recommend(replace(QUESTION, task=task)).case.rank == TASKS[task][0]


def test_one_variant_with_more_data_than_any_adapter_holds_is_trained_whole() -> None:
    large = replace(QUESTION, examples=10_000_000, devices=8)
    assert recommend(large).case.method == "full"
    assert "more data than any adapter" in reasons(large)
    several = recommend(replace(large, variants=20))
    assert several.case.method == "lora"
    assert several.case.rank == RANKS[-1]
    assert "20 full copies would be 321 GB" in "\n".join(several.reasons)


def test_a_small_device_takes_qlora_and_says_what_the_rest_would_take() -> None:
    question = replace(QUESTION, gpu=GPUS["rtx4090"], shape=KNOWN_SHAPES["llama-2-13b"])
    chosen = recommend(question)
    assert chosen.case.method == "qlora"
    assert "lora with checkpointing would take 2" in "\n".join(chosen.reasons)
    assert chosen.need.total <= 24e9


def test_several_devices_share_out() -> None:
    chosen = recommend(replace(QUESTION, shape=KNOWN_SHAPES["llama-3.1-70b"], devices=4))
    assert chosen.case.method == "lora"
    assert chosen.case.sharding.stage == 3
    assert chosen.spec["sharding"] == "fsdp"


def test_what_does_not_fit_at_all_is_refused_with_figures() -> None:
    with pytest.raises(
        PlanError, match=r"nothing fits 1 x l4 of 22\.8 usable GB: .*qlora with checkpointing would take"
    ):
        recommend(replace(QUESTION, shape=KNOWN_SHAPES["llama-3.1-70b"], gpu=GPUS["l4"]))


def test_few_examples_are_warned_about() -> None:
    assert "only 10 examples" in reasons(replace(QUESTION, examples=10))
    assert "only" not in reasons(QUESTION)


@pytest.mark.parametrize("changes", [{}, {"gpu": GPUS["l4"]}, {"devices": 8}, {"examples": 10_000_000, "devices": 8}])
def test_the_recommended_spec_is_one_that_the_trainer_takes(changes: dict[str, object]) -> None:
    chosen = recommend(replace(QUESTION, **changes))  # type: ignore[arg-type]
    spec = TrainSpec.from_mapping({"base": "base", "data": "data.jsonl", **chosen.spec})
    assert spec.method == chosen.case.method
    assert spec.base == Path("base")
    if spec.method != "full":
        assert spec.adapter.rank == chosen.case.rank


@pytest.mark.parametrize(
    ("changes", "message"), [({"task": "magic"}, "task must be one of style"), ({"examples": 0}, "at least 1, got 0")]
)
def test_impossible_wishes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(QUESTION, **changes)  # type: ignore[arg-type]
