"""`multilora`: puts the commands together. Heavy modules (torch, the engine, the API) are imported inside the commands
that need them, so that help and typing errors answer at once."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lora_kernels.process import compile_nothing, grow_gpu_segments, hold_to_quota, keep_few_primitives, spin_briefly
from server.cli.adapters import adapter, quarantine
from server.cli.common.failures import EPILOG, USER_ERRORS, failure_of
from server.cli.common.options import JSON_KEY
from server.cli.common.output import complain
from server.cli.common.setting_options import drop_service_link
from server.cli.demo import command as demo
from server.cli.serve import command as serve
from server.cli.tenants import audit, tenant, usage
from server.cli.tools import adopt, bench, doctor, plan
from server.cli.training import data, jobs, onboard, train


class ReportingGroup(TyperGroup):
    """The commands; an error that a user can cause ends as one line (or one JSON object) and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output closed it; typer handles this
            raise
        except USER_ERRORS as error:
            failure = failure_of(error)
            if ctx.meta.get(JSON_KEY):
                print(json.dumps(failure.body), flush=True)
            else:
                complain(failure.line)
            raise typer.Exit(failure.exit_code) from error


app = typer.Typer(
    name="multilora",
    help="Serve thousands of tenants' LoRA adapters on one shared frozen base model.",
    epilog=EPILOG,
    cls=ReportingGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"multilora {version('multilora')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve thousands of tenants' LoRA adapters on one shared frozen base model."""
    drop_service_link()
    spin_briefly()  # before any command imports torch
    hold_to_quota()
    keep_few_primitives()
    compile_nothing()
    grow_gpu_segments()


app.command(epilog=EPILOG)(demo.demo)
app.command(epilog=EPILOG)(serve.serve)
app.command(epilog=EPILOG)(adopt.adopt)
app.add_typer(tenant.app, name="tenant", epilog=EPILOG)
app.add_typer(adapter.app, name="adapter", epilog=EPILOG)
app.command(epilog=EPILOG)(audit.audit)
app.command(epilog=EPILOG)(usage.usage)
app.add_typer(quarantine.app, name="quarantine", epilog=EPILOG)
app.add_typer(plan.app, name="plan", epilog=EPILOG)
app.add_typer(data.app, name="data", epilog=EPILOG)
app.command(epilog=EPILOG)(onboard.onboard)
app.add_typer(jobs.app, name="jobs", epilog=EPILOG)
app.command(epilog=EPILOG)(train.train)
app.add_typer(bench.app, name="bench", epilog=EPILOG)
app.command(epilog=EPILOG)(doctor.doctor)


def main() -> None:
    """The entry point of the distribution."""
    app()
