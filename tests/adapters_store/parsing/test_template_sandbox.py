"""The process that renders templates: found wherever this one runs from, and its end is no fault of a template."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapters_store.base.tokenizer import check_template
from adapters_store.parsing import template_sandbox
from adapters_store.parsing.template_sandbox import SandboxEnded, TemplateFailed, TemplateSandbox, TemplateTooCostly

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def python(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Let the sandbox start this instead of Python."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{line}\n")
    script.chmod(0o755)
    monkeypatch.setattr(template_sandbox, "sys", SimpleNamespace(executable=str(script)))


def test_it_needs_no_installed_package_and_no_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on PYTHONPATH, as on a bare GPU machine: every template was "too costly" there."""
    python(tmp_path, monkeypatch, f'exec "{sys.executable}" -S "$@"')
    with TemplateSandbox() as sandbox:
        assert sandbox.render("{{ x }}!", {"x": 1}) == "1!"


def test_a_process_that_does_not_start_is_no_fault_of_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    python(tmp_path, monkeypatch, "exit 1")
    with TemplateSandbox() as sandbox, pytest.raises(SandboxEnded):
        sandbox.render("{{ x }}", {"x": 1})
    rendered: list[str] = []
    base = SimpleNamespace(
        chat_template="a template of this test",
        apply_chat_template=lambda chat, **options: rendered.append(options["chat_template"]),
    )
    check_template(base, "--base x")
    assert rendered == ["a template of this test"]
    assert "is rendered without limits" in caplog.text


def test_what_jinja_itself_raises_is_the_templates_fault_and_not_its_cost() -> None:
    with TemplateSandbox() as sandbox:
        with pytest.raises(TemplateFailed, match="at least one item") as failed:
            sandbox.render("{{ cycler() }}", {})
        assert not isinstance(failed.value, TemplateTooCostly)


def test_a_template_without_end_ends_and_the_next_is_rendered() -> None:
    with TemplateSandbox() as sandbox:
        with pytest.raises(TemplateTooCostly, match="1 s of processor time"):
            sandbox.render(NESTED, {})
        assert sandbox.render("{{ x }}", {"x": 2}) == "2"
