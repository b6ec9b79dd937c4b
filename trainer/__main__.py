"""`python -m trainer SPEC.yaml --run-dir DIR [--resume] [--track NAME]`, alone or under torchrun. Decides exit codes.

Exit codes: 0 succeeded, 1 failed (another attempt may work), 2 bad input, 3 paused, 4 cancelled; result.json says why.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.base.converted.door import folder_of
from lora_kernels.process import compile_nothing, end_with_parent, hold_to_quota, map_large_blocks, unscanned_imports
from trainer.failures import failure_of
from trainer.run_folder.folder import Exit, RunFolder

if TYPE_CHECKING:
    from trainer.model.held import HeldBase


def main(arguments: list[str] | None = None, held: HeldBase | None = None) -> int:
    """Run to the end. An error is written into the run folder before it is printed. held: of a resident process."""
    options = _options(arguments)
    if "RANK" in os.environ:  # torchrun gives each rank a session: a kill of its own group does not reach them
        end_with_parent()
    hold_to_quota()
    compile_nothing()
    map_large_blocks()
    return trained(options.spec, options.run_dir, resume=options.resume, track=options.track, held=held)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Train one spec.")
    parser.add_argument("spec", type=Path, help="the spec, as YAML or JSON")
    parser.add_argument("--run-dir", type=Path, required=True, help="where events, checkpoints and the adapter go")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the newest whole checkpoint, if there is one"
    )
    parser.add_argument(
        "--track", action="append", default=[], metavar="NAME", help="show the run in tensorboard, mlflow or wandb, too"
    )
    return parser.parse_args(arguments)


def preload() -> None:
    """Import all that a run imports: what a resident process shares with its tasks."""
    import trainer.run  # noqa: F401


def keeps(arguments: list[str], held: HeldBase | None) -> bool:
    """Whether this run needs what a resident process holds, or nothing. Raises SpecError, OSError."""
    from trainer.holding import is_held
    from trainer.spec import TrainSpec

    return is_held(TrainSpec.from_yaml(_options(arguments).spec), held)


def hold(arguments: list[str]) -> HeldBase | None:
    """What a resident process holds for this run and for those that follow. Raises SpecError, UnsupportedBase,
    OSError."""
    from trainer.holding import held_for
    from trainer.spec import TrainSpec

    return held_for(TrainSpec.from_yaml(_options(arguments).spec))


def trained(
    spec_path: Path, run_dir: Path, *, resume: bool, track: Sequence[str] = (), held: HeldBase | None = None
) -> Exit:
    """The run's exit code."""
    with unscanned_imports():
        from trainer.run import train
        from trainer.run_folder.events import RunLog
        from trainer.spec import TrainSpec

    folder, spec = RunFolder(run_dir), None
    earlier = folder.result() if resume and not folder.has_succeeded else None
    try:
        spec = TrainSpec.from_yaml(spec_path)
        spec = spec.model_copy(update={"base": folder_of(spec.base, print)})
        return train(spec, run_dir, resume=resume, track=track, held=held)
    except Exception as error:  # noqa: BLE001  (any error must reach the run folder)
        failure = failure_of(error, spec)
        if failure.code == "internal_error":
            traceback.print_exc()
        print(f"{failure.code}: {failure.message}", file=sys.stderr)
        if failure.code != "run_dir_in_use":  # its result is the other run's
            run_dir.mkdir(parents=True, exist_ok=True)
            RunLog(folder, quiet=True).failed(failure.body, failure.exit, earlier=earlier)
        return failure.exit


if __name__ == "__main__":
    sys.exit(main())
