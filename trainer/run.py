"""One run from spec to folder: data, model, loop, publish; started, resumed, paused. Knows the order of the parts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from adapters_store.base.files import describe_base, load_config
from adapters_store.filesystem import Filesystem
from trainer.data.dataset import ENOUGH, PreparedData, batches_of, enough_of, prepare
from trainer.data.packing import InOrder
from trainer.data.split import ENOUGH_VALIDATION
from trainer.gate.data_check import check_data
from trainer.loop import Loop
from trainer.model.adapter import digest_of
from trainer.model.eva import start_from_data
from trainer.model.held import HeldBase, tokenizer_of
from trainer.model.memory import peak_bytes
from trainer.model.model import Trainee, load
from trainer.model.packing_check import check_packing
from trainer.model.ranks import Ranks, joined
from trainer.model.sharding import load_sharded
from trainer.optim import make_optimizer
from trainer.report.evaluated import EvaluationSamples
from trainer.run_folder.checkpoint import Checkpoints
from trainer.run_folder.control import Control
from trainer.run_folder.events import RunLog
from trainer.run_folder.folder import Exit, RunDirInUse, RunFolder, as_json
from trainer.run_folder.publish import exporter, publish, versions
from trainer.spec import AdapterSpec, TrainSpec
from trainer.starting import filled_in
from trainer.tracking.trackers import check_usable, tracking


def check_run_dir(spec: TrainSpec, folder: RunFolder, *, resume: bool) -> None:
    """The folder must be empty, or (to resume) hold the same run; every rank checks. Raises RunDirInUse.

    Paths of an unfinished run may differ: another host may resume it, and provenance.json proves the same content.
    """
    if folder.has_begun and not resume:
        message = f"{folder.path} already holds a run; resume it with --resume, or choose another folder"
        raise RunDirInUse(message)
    if resume and folder.spec.exists() and not _is_same(TrainSpec.from_yaml(folder.spec), spec, folder):
        raise RunDirInUse(f"{folder.path} holds a run with another spec; choose another folder")


def _is_same(before: TrainSpec, now: TrainSpec, folder: RunFolder) -> bool:
    if before == now or folder.has_succeeded:
        return before == now
    paths = {"base", "data", "validation", "mix", "initial_adapter"}
    return before.model_dump(exclude=paths) == now.model_dump(exclude=paths)


@dataclass(eq=False)
class Run:
    """One process's part in a run. `train` returns how it ended; errors are the caller's (see trainer.failures).
    held: the run's base, if a resident process holds it."""

    spec: TrainSpec
    folder: RunFolder
    ranks: Ranks
    log: RunLog
    control: Control
    held: HeldBase | None = None

    def train(self) -> Exit:
        """Raises SpecError, DataRejected, UnsupportedBase, Diverged, PackingBroken, OSError, torch's own errors."""
        start_s = time.perf_counter()
        disable_progress_bar()
        self.log.event("stage", stage="data")
        _ = self._base_digest  # a faulty base is reported before all data is read
        data = self._prepared_data()
        self._check_provenance(data)
        self.log.event("stage", stage="model")
        trainee = self._trainee(data)
        difference = check_packing(trainee, data.train, self.held.packing_difference if self.held else None)
        loop = self._loop(trainee, data)
        if loop.progress.step == 0 and self.spec.objective == "supervised":
            self._check_prompts(trainee, data, loop.num_steps)
        self.log.event("stage", stage="training", packing_difference=difference, num_steps=loop.num_steps)
        outcome = loop.run()
        if outcome != "finished":
            code = Exit.PAUSED if outcome == "paused" else Exit.CANCELLED
            result = {"status": outcome, "exit_code": code, **self._facts(loop, start_s)}
            self.log.end(outcome, result, step=loop.progress.step)
            return code
        self._publish(loop, start_s)
        return Exit.SUCCEEDED

    def _check_prompts(self, trainee: Trainee, data: PreparedData, num_steps: int) -> None:
        """Warn, before anything is trained, of answers that do not seem to belong to their prompts."""
        batch, facts = self.spec.batch, data.facts
        step_tokens = batch.tokens or batch.examples * facts.num_tokens / facts.num_train
        found = check_data(trainee, data.train, trained_tokens=num_steps * step_tokens)
        use = found.use and asdict(found.use)
        self.log.event("data_check", level=found.level, message=found.message, base_prompt_use=use)

    @cached_property
    def _base_digest(self) -> str:
        return self.held.digest if self.held else describe_base(self.spec.base).digest

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self.spec.base, self.held)

    def _prepared_data(self) -> PreparedData:
        config = load_config(self.spec.base)
        return prepare(
            self.spec,
            self._tokenizer,
            max_model_len=int(config.max_position_embeddings),
            num_embeddings=int(config.vocab_size),
            enough=self._enough_validation,
        )

    @cached_property
    def _enough_validation(self) -> int:
        """As the run began: a run of an earlier version keeps what it held out."""
        path = self.folder.provenance
        return enough_of(json.loads(path.read_text())) if path.exists() else ENOUGH_VALIDATION

    def _check_provenance(self, data: PreparedData) -> None:
        """Write down what is trained on; a resumed run must find the same. Raises RunDirInUse."""
        path = self.folder.provenance
        self._provenance = {"base_digest": self._base_digest, **data.facts.to_mapping(), "seed": self.spec.seed}
        self._provenance[ENOUGH] = self._enough_validation
        if self.spec.initial_adapter is not None:
            self._provenance["initial_adapter"] = digest_of(self.spec.initial_adapter, self._base_digest)
        if not path.exists():
            if self.ranks.is_first:
                self.folder.write(path, as_json(self._provenance))
            return
        before = json.loads(path.read_text())
        before |= {ENOUGH: enough_of(before)}
        changed = [name for name, value in self._provenance.items() if before.get(name) != value]
        if changed:
            raise RunDirInUse(f"{self.folder.path}: {', '.join(changed)} differ from when the run began")

    def _trainee(self, data: PreparedData) -> Trainee:
        if self.ranks.mesh is not None:
            return load_sharded(self.spec, self.ranks)
        trainee = load(self.spec, self.ranks.device, self.held)
        if self.spec.adapter.init == "eva":
            start_from_data(trainee, InOrder(data.train, micro_batch_tokens=self.spec.batch.forward_tokens))
        return trainee

    def _loop(self, trainee: Trainee, data: PreparedData) -> Loop:
        checkpoints = Checkpoints(
            self.folder,
            self.ranks,
            exporter(trainee, self.spec, self._base_digest),
            self.spec.keep_best,
            self.spec.keep_last,
        )
        loop = Loop(
            self.spec,
            trainee,
            make_optimizer(trainee.trained(), self.spec.optim),
            batches_of(self.spec, data.train, rank=self.ranks.rank, world_size=self.ranks.world_size),
            InOrder(
                data.validation,
                micro_batch_tokens=self.spec.batch.forward_tokens,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            ),
            self.ranks,
            checkpoints,
            self.control,
            self.log,
            EvaluationSamples(trainee, self._tokenizer, data.validation, self.spec.eval_samples),
        )
        checkpoints.clean()
        if steps := self.folder.checkpoint_steps():
            loop.progress = checkpoints.restore(steps[-1], trainee, loop.optimizer)
            self.log.event("stage", stage="resumed", step=loop.progress.step)
        return loop

    def _publish(self, loop: Loop, start_s: float) -> None:
        self.log.event("stage", stage="publishing")
        best = loop.progress.best
        assert best is not None, "a finished run has evaluated its last step"
        if self.ranks.is_first:
            output = publish(loop.trainee, self.spec, self.folder.checkpoint(best.step), self.folder)
            result = {"status": "succeeded", "output": output.name, **self._facts(loop, start_s)}
            self.log.end("succeeded", result, step=loop.progress.step, best_step=best.step, best_loss=best.loss)
        self.ranks.wait()

    def _facts(self, loop: Loop, start_s: float) -> dict[str, Any]:
        progress = loop.progress
        best = progress.best
        return {
            "method": self.spec.method,
            "step": progress.step,
            "num_steps": loop.num_steps,
            "best_step": best.step if best else None,
            "losses": {
                "base": progress.base_loss,
                "best": best.loss if best else None,
                "first_step": progress.first_loss,
                "last_step": progress.last_loss,
            },
            "tokens": progress.tokens,
            "tokens_per_s": progress.tokens / progress.train_s if progress.train_s else None,
            "train_s": progress.train_s,
            "wall_s": time.perf_counter() - start_s,
            "peak_bytes": peak_bytes(self.ranks.device),
            "num_trained_parameters": sum(weight.numel() for weight in loop.trainee.trained()),
            "world_size": self.ranks.world_size,
            "device": str(self.ranks.device),
            "provenance": {**self._provenance, "versions": versions()},
        }


def _with_tokens(spec: TrainSpec, held: HeldBase | None) -> TrainSpec:
    """The spec with the tokens of an invocation that it gives as text. Raises SpecError for a text of too many."""
    text = spec.adapter.alora_invocation_tokens
    if not isinstance(text, str):
        return spec
    ids = tokenizer_of(spec.base, held).encode(text, add_special_tokens=False)
    adapter = AdapterSpec.model_validate({**spec.adapter.model_dump(), "alora_invocation_tokens": ids})
    return spec.model_copy(update={"adapter": adapter})


def train(
    spec: TrainSpec,
    run_dir: Path,
    *,
    resume: bool = False,
    track: Sequence[str] = (),
    files: Filesystem | None = None,
    held: HeldBase | None = None,
) -> Exit:
    """Run a spec in this process (and with its peers under torchrun). The folder is described in docs/training.md.

    track: the trackers that get the run's numbers and samples (trainer.tracking). held: of a resident process."""
    check_usable(track)
    held = held if held and held.is_of(spec.base) else None
    folder, spec = RunFolder(run_dir, files or Filesystem()), _with_tokens(filled_in(spec), held)
    with joined(sharded=spec.sharding == "fsdp") as ranks:
        check_run_dir(spec, folder, resume=resume)
        ranks.wait()
        if ranks.is_first:
            run_dir.mkdir(parents=True, exist_ok=True)
            folder.write(folder.spec, spec.to_yaml().encode())
        ranks.wait()
        if resume and folder.has_succeeded:
            return Exit.SUCCEEDED
        log = RunLog(folder, quiet=not ranks.is_first)
        if ranks.is_first:
            folder.drop_result()
        first_step = max(folder.checkpoint_steps(), default=0) + 1
        shown = tracking(track if ranks.is_first else (), folder, spec, first_step=first_step, note=log.note)
        with Control(folder) as control, shown as show:
            log.listeners.append(show)
            return Run(spec, folder, ranks, log, control, held).train()
