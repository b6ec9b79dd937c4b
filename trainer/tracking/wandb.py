"""Weights & Biases, by its own client (package wandb). Its variables say where to and how: WANDB_PROJECT, WANDB_MODE,
WANDB_API_KEY, ...; WANDB_MODE=offline writes files into the run folder, for `wandb sync`."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping

from trainer.tracking.tracker import Tracked

PROJECT = "multilora"


class NoKey(Exception):
    """Neither WANDB_API_KEY nor a login is there, and the run would be sent."""


class WandbTracker:
    """One W&B run, which a resumed training continues. What the trainer prints, its code and git stay here."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        self._html = wandb.Html
        is_sent = wandb.setup().settings.mode not in ("offline", "disabled", "dryrun")
        if is_sent and not wandb.login(prompt=False, verify=False):
            raise NoKey  # the client would open a run that no account owns
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, disable_code=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            dir=str(run.folder),
            config=dict(run.parameters),
            id=run.tracker_id,
            resume="allow",
            settings=quiet,
        )
        self.run_id: str = self._run.id

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=int(status == "failed"))
