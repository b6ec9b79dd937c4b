"""What POST /v1/fine_tuning/jobs accepts: OpenAI's fields for supervised and dpo jobs, and `multilora` for the rest."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.api.wire.body import Absent, Body, Empty, Metadata
from server.jobs.store.job_request import MIX_KNOB, NODES_KNOB, RANKS_KNOB, JobRequest

Id = Annotated[str, Field(min_length=1, max_length=128)]


class Hyperparameters(Body):
    """ "auto" is the default: 3 epochs, 16 examples, learning rate 2e-4."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] | None = None
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=100_000)] | None = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in self if value not in (None, "auto")}


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class DpoHyperparameters(Hyperparameters):
    """beta "auto": 0.1; the learning rate's multiplier is of 5e-5."""

    beta: Literal["auto"] | Annotated[float, Field(gt=0, le=2)] | None = None


class Dpo(Body):
    hyperparameters: DpoHyperparameters | None = None


class Method(Body):
    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Absent = None

    @model_validator(mode="after")
    def _has_one_section(self) -> Self:
        other = "supervised" if self.type == "dpo" else "dpo"
        if getattr(self, other) is not None:
            raise PydanticCustomError("invalid_value", f"{other} must be absent with type {self.type!r}")
        return self

    def given(self) -> dict[str, Any]:
        section = self.dpo if self.type == "dpo" else self.supervised
        return section.hyperparameters.given() if section and section.hyperparameters else {}


class NewFineTuningJob(Body):
    """multilora: our own knobs, flat: rank, alpha, target_modules, learning_rate, max_steps, mix_file, ..."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: Id
    validation_file: Id | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    integrations: Empty = None
    metadata: Metadata | None = None
    multilora: dict[str, Any] | None = None

    @field_validator("multilora")
    @classmethod
    def _names_a_file(cls, knobs: dict[str, Any] | None) -> dict[str, Any] | None:
        if knobs and not isinstance(knobs.get(MIX_KNOB), str | None):
            raise PydanticCustomError("invalid_type", f"{MIX_KNOB} must be a file id")
        for name in (NODES_KNOB, RANKS_KNOB):
            if knobs and type(knobs.get(name, 1)) is not int:
                raise PydanticCustomError("invalid_type", f"{name} must be a whole number")
        return knobs

    def to_request(self) -> JobRequest:
        """`method`'s hyperparameters go before the older, bare ones."""
        asked = self.hyperparameters.given() if self.hyperparameters else {}
        asked |= self.method.given() if self.method else {}
        knobs = dict(self.multilora or {})
        return JobRequest(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            mix_file=knobs.pop(MIX_KNOB, None),
            nodes=knobs.pop(NODES_KNOB, 1),
            ranks=knobs.pop(RANKS_KNOB, 1),
            suffix=self.suffix,
            seed=self.seed,
            hyperparameters=asked,
            objective=self.method.type if self.method else "supervised",
            metadata=self.metadata,
            knobs=knobs,
        )


class Override(Body):
    """Why a blocked adapter goes into service all the same."""

    reason: Annotated[str, Field(min_length=1, max_length=1000)]
