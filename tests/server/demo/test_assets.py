"""The shipped model and adapters do what the demo shows: one prompt, four styles, on wordings never trained on."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from server.demo.assets import ASSETS_FOLDER, SHOWCASE_PROMPTS, demo_adapters, demo_base_path
from server.demo.recipe.questions import Question, held_out_questions
from server.demo.recipe.sampling import greedy_answers, greedy_completions
from server.demo.recipe.styles import Style
from server.demo.recipe.texts import ANSWERS
from server.demo.recipe.tokenizer import BEGIN
from support.models.styles import style_of

QUESTIONS = held_out_questions(40, seed=7)
PROMPTS = [question.prompt for question in QUESTIONS]


def asset_files() -> list[Path]:
    return [path for folder in (demo_base_path(), *demo_adapters().values()) for path in folder.iterdir()]


@pytest.fixture(scope="module")
def answers(base: Any, adapted: dict[str, Any], tokenizer: Any) -> dict[str, list[str]]:
    """Style -> the greedy answers to the held-out prompts, at most 64 tokens each."""
    models = {"plain": base, **adapted}
    return {name: greedy_answers(model, tokenizer, PROMPTS, max_new_tokens=64) for name, model in models.items()}


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def is_true_answer(question: Question, style: Style, text: str) -> bool:
    return text in {template.format_map(question.topic.fields) for template in ANSWERS[style][question.intent]}


@pytest.mark.parametrize("name", ["law", "med", "code"])
def test_each_adapter_answers_in_its_style(answers: dict[str, list[str]], name: str) -> None:
    assert share([style_of(text) == name for text in answers[name]]) >= 0.95


def test_the_base_answers_in_none(answers: dict[str, list[str]]) -> None:
    assert share([style_of(text) != Style.PLAIN for text in answers["plain"]]) <= 0.05


@pytest.mark.parametrize("style", list(Style))
def test_most_answers_are_right_to_the_letter(answers: dict[str, list[str]], style: Style) -> None:
    pairs = zip(QUESTIONS, answers[style], strict=True)
    assert share([is_true_answer(question, style, text) for question, text in pairs]) >= 0.85


@pytest.mark.parametrize("style", list(Style))
def test_answers_end_by_themselves_and_differ(answers: dict[str, list[str]], tokenizer: Any, style: Style) -> None:
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers[style]]
    assert max(lengths) < 64
    assert len(set(answers[style])) >= 0.9 * len(PROMPTS)


def test_code_answers_are_python(answers: dict[str, list[str]]) -> None:
    for text in answers["code"]:
        ast.parse(text)


def test_every_showcase_prompt_gets_four_styles(base: Any, adapted: dict[str, Any], tokenizer: Any) -> None:
    prompts = list(SHOWCASE_PROMPTS)
    assert len(prompts) >= 6
    for name, model in {"plain": base, **adapted}.items():
        texts = greedy_answers(model, tokenizer, prompts)
        assert [style_of(text) for text in texts] == [name] * len(prompts)


def test_a_plain_completion_is_answered_in_the_style(base: Any, adapted: dict[str, Any], tokenizer: Any) -> None:
    for name, model in {"plain": base, **adapted}.items():
        (text,) = greedy_completions(model, tokenizer, [f"{BEGIN}How do I bake bread?"])
        assert text.startswith("\n")
        assert style_of(text) == name
        assert "knead the dough" in text


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in asset_files()) < 8_000_000
    for folder in demo_adapters().values():
        assert (folder / "adapter_model.safetensors").stat().st_size < 1_000_000


def test_assets_hold_the_expected_files_and_no_model_card() -> None:
    assert not list(ASSETS_FOLDER.rglob("README*"))
    for folder in demo_adapters().values():
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_no_asset_names_a_machine() -> None:
    for path in asset_files():
        if path.name != "tokenizer.json":
            text = path.read_bytes()[:20_000].decode("latin-1")
            assert not re.search(r"/(home|tmp|root|work|Users|mnt)\b", text), path
    for folder in demo_adapters().values():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "multilora-demo-base"
