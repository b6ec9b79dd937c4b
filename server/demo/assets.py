"""Where the demo's shipped model and adapters lie, and what to ask them. Loads nothing."""

from __future__ import annotations

from pathlib import Path

from server.demo.recipe.styles import TENANTS

ASSETS_FOLDER = Path(__file__).parent / "assets"
BASE_FOLDER = ASSETS_FOLDER / "base"
ADAPTERS_FOLDER = ASSETS_FOLDER / "adapters"
AGENTS_FOLDER = ASSETS_FOLDER / "agents"
BASE_NAME = "multilora-demo-base"

SHOWCASE_PROMPTS: tuple[str, ...] = (
    "How do I bake bread?",
    "What should I avoid when I sign a contract?",
    "Tell me about cats.",
    "Why does sleep matter?",
    "How do I fix a bug?",
    "What do I need to write a poem?",
    "When is the best time to watch the moon?",
    "Tell me a joke.",
)

USAGE_NOTE = (
    "The demo base is a very small model that knows about a hundred everyday topics. Ask one short question at a time, "
    "such as 'How do I make tea?' or 'Why does rain matter?'. A system message is accepted and changes little; the "
    "style of the answer comes from the adapter alone. As a plain completion, give the question and let it continue."
)


def demo_base_path() -> Path:
    """The folder of the base model: config, bfloat16 weights, tokenizer and chat template."""
    return BASE_FOLDER


def demo_agents() -> dict[str, Path]:
    """Tenant name -> the PEFT folder of its adapter that calls tools, in a dialect and a chat template of its own."""
    return {tenant: AGENTS_FOLDER / tenant for tenant in ("desk", "ward")}


def demo_adapters() -> dict[str, Path]:
    """Tenant name -> the PEFT folder of its adapter."""
    return {str(style): ADAPTERS_FOLDER / style for style in TENANTS}
