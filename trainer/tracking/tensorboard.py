"""TensorBoard's event files, in the run folder, by torch's own writer (package tensorboard)."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.tracking.tracker import Tracked

FOLDER = "tensorboard"
FLUSH_S = 10


class TensorBoardTracker:
    """A run that resumes writes another file; TensorBoard drops the steps that it takes again."""

    run_id = None

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.first_step if run.first_step > 1 else None
        self._writer = SummaryWriter(str(run.folder / FOLDER), purge_step=purge, flush_secs=FLUSH_S)
        if purge is None:
            rows = "\n".join(f"| {name} | {' '.join(str(value).split())} |" for name, value in run.parameters.items())
            self.text(0, "spec", f"| field | value |\n|---|---|\n{rows}")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self, status: str) -> None:
        self._writer.close()
