"""The optimizer steps of a run: train, evaluate, keep, stop. Knows batches and a model; knows no files' formats.

Every step seeds the random numbers from (seed, step, rank), takes its learning rate from the step's number and its data
from the cursor: weights, optimizer state and Progress are all that an exact resume needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from adapters_store.errors import UserError
from trainer.data.packing import Batches
from trainer.data.types import PackedBatch, StepBatch
from trainer.model.memory import peak_bytes
from trainer.model.model import Trainee
from trainer.model.ranks import Ranks
from trainer.model.threads import SharedThreads
from trainer.optim import clip, learning_rate, set_learning_rate
from trainer.report.evaluated import EvaluationSamples
from trainer.run_folder.checkpoint import Checkpoints
from trainer.run_folder.control import Control
from trainer.run_folder.events import RunLog
from trainer.run_folder.folder import CANCEL, PAUSE
from trainer.run_folder.progress import Progress
from trainer.spec import TrainSpec

LONG_EPOCH = 32  # optimizer steps
SHOW_LIFE_S = 5.0
Outcome = Literal["finished", "paused", "cancelled"]


class Diverged(UserError):
    """The loss or the gradient is no longer finite; more steps would train nothing."""

    def __init__(self, message: str) -> None:
        super().__init__("diverged", message, param="optim.learning_rate")


def steps_between_evaluations(epoch_steps: int) -> int:
    """An epoch; a third of a long one, so that early stopping has evaluations to count."""
    return epoch_steps if epoch_steps < LONG_EPOCH else -(-epoch_steps // 3)


class _Interrupted(Exception):
    """A pause or a cancel was requested between two forwards of a step: the step is not taken."""

    def __init__(self, request: str) -> None:
        super().__init__(request)
        self.request = request


@dataclass(eq=False)
class Loop:
    """validation: this rank's share, as many forwards on every rank. checkpoints are taken at every evaluation."""

    spec: TrainSpec
    trainee: Trainee
    optimizer: torch.optim.Optimizer
    batches: Batches
    validation: Iterable[PackedBatch]
    ranks: Ranks
    checkpoints: Checkpoints
    control: Control
    log: RunLog
    samples: EvaluationSamples | None = None
    threads: SharedThreads = field(default_factory=SharedThreads.from_environment)
    progress: Progress = field(default_factory=Progress)
    _shown_s: float = field(default=0.0, init=False)

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run. With batch.tokens every epoch is cut to count them."""
        return self.spec.optim.max_steps or self.batches.num_steps(self.spec.optim.epochs)

    @cached_property
    def eval_every(self) -> int:
        return self.spec.eval_every or steps_between_evaluations(self.batches.num_steps(1))

    def run(self) -> Outcome:
        """Train from `progress` to the end, or until a pause or cancel is requested.

        Raises Diverged, OSError, torch's own errors.
        """
        if self.progress.base_loss is None:
            base_loss = self._held_out_loss()
            self.progress = replace(self.progress, base_loss=base_loss)
            self._report_evaluation(base_loss)
        patience = self.spec.early_stopping_patience
        while self.progress.step < self.num_steps and not self.progress.is_stale(patience):
            request = self.ranks.agreed(self.control.requested())
            if request:
                return self._stop(request)
            try:
                self._step()
            except _Interrupted as interrupted:
                self.optimizer.zero_grad()
                return self._stop(interrupted.request)
            if self.progress.step % self.eval_every == 0 or self.progress.step == self.num_steps:
                self._evaluate()
        return "finished"

    def _stop(self, request: str) -> Outcome:
        if request == PAUSE:
            self._save()
        if self.ranks.is_first:
            self.control.clear()
        return "cancelled" if request == CANCEL else "paused"

    def _step(self) -> None:
        start_s = time.perf_counter()
        progress, num_steps = self.progress, self.num_steps
        batch = self.batches.at(progress.cursor)
        rate = learning_rate(progress.step, num_steps, self.spec.optim)
        set_learning_rate(self.optimizer, rate)
        self._seed()
        loss = self._accumulate(batch)
        norm = clip(self.trainee.trained(), self.spec.optim.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(
                f"step {progress.step + 1}: loss {loss:g}, gradient norm {norm:g} at learning rate {rate:g}; "
                "a lower optim.learning_rate may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        step_s = time.perf_counter() - start_s
        self.progress = replace(
            progress,
            step=progress.step + 1,
            cursor=self.batches.after(progress.cursor),
            tokens=progress.tokens + batch.num_tokens,
            train_s=progress.train_s + step_s,
            first_loss=loss if progress.first_loss is None else progress.first_loss,
            last_loss=loss,
        )
        self._report_progress(batch, step_s, {"loss": loss, "learning_rate": rate, "grad_norm": norm})

    def _seed(self) -> None:
        """Dropout's random numbers: another stream for every step and rank, the same after a resume."""
        torch.manual_seed(((self.spec.seed * 1_000_003 + self.progress.step) * 1_009 + self.ranks.rank) % (1 << 63))

    def _accumulate(self, batch: StepBatch) -> float:
        """Gradients of the step's mean loss per weighted token, over all forwards and ranks; returns that loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for number, micro_batch in enumerate(batch.micro_batches):
            request = self.ranks.agreed(self.control.requested()) if number else ""
            if request:
                raise _Interrupted(request)
            self._show_life("the first step", number, len(batch.micro_batches))
            self.threads.adjust()
            loss = self.trainee.loss(micro_batch)
            (loss * (self.ranks.world_size / batch.weight)).backward()  # sharding averages gradients over the ranks
            total += loss.detach()
        return float(self.ranks.total(total)) / batch.weight

    def _report_progress(self, batch: StepBatch, step_s: float, fields: dict[str, float]) -> None:
        progress = self.progress
        left = self.num_steps - progress.step
        self.log.event(
            "step",
            step=progress.step,
            num_steps=self.num_steps,
            epoch=progress.cursor.epoch,
            **fields,
            tokens=progress.tokens,
            tokens_per_s=batch.num_tokens / step_s,
            peak_bytes=peak_bytes(self.ranks.device),
            eta_s=left * progress.train_s / progress.step,
        )

    def _show_life(self, what: str, done: int, of: int | None) -> None:
        """Before the first step has ended, an event at its start and every SHOW_LIFE_S: it may take minutes."""
        now_s = time.monotonic()
        if self.progress.step == 0 and (done == 0 or now_s - self._shown_s >= SHOW_LIFE_S):
            self._shown_s = now_s
            self.log.event("working", what=what, done=done, of=of, num_steps=self.num_steps)

    def _evaluate(self) -> None:
        loss = self._held_out_loss()
        if not math.isfinite(loss):
            raise Diverged(f"step {self.progress.step}: held-out loss {loss:g}; a lower optim.learning_rate may help")
        self.progress = self.progress.with_evaluation(loss)
        self._report_evaluation(loss)
        self._save()

    def _report_evaluation(self, loss: float) -> None:
        self.log.event("eval", step=self.progress.step, loss=loss, base_loss=self.progress.base_loss)
        for sample in self.samples.taken() if self.samples else ():
            self.log.event("sample", step=self.progress.step, **sample)

    def _save(self) -> None:
        saved = self.checkpoints.save(self.trainee, self.optimizer, self.progress)
        path = saved.relative_to(self.checkpoints.folder.path)
        self.log.event("checkpoint", step=self.progress.step, path=str(path))

    def _held_out_loss(self) -> float:
        """Mean nll per weighted held-out token, in nats."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        with self.trainee.evaluating():
            for number, batch in enumerate(self.validation):
                self._show_life("the held-out loss of the base", number, None)
                self.threads.adjust()
                sums[0] += self.trainee.loss(batch)
                sums[1] += batch.weight
        nll, weight = self.ranks.total(sums).tolist()
        return float(nll / weight)
