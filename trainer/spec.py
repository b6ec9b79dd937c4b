"""What one training run is: base, data, method and every knob, checked once. Knows no tensors, files are only named.

    TrainSpec.from_yaml(path) -> TrainSpec -> trainer.run        to_mapping() is the inverse of from_mapping()

One optimizer step always consumes the same examples: `batch.examples` of them (or as many as fit `batch.tokens`), in an
order that seed and epoch alone decide. They are packed into forwards of at most `batch.micro_tokens` tokens, which the
ranks share out. So neither the size of a forward nor the number of ranks changes what is computed; the number of
accumulated forwards follows and is not a knob.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml

from trainer import spec_fields as check
from trainer.spec_fields import SpecError

__all__ = ["AdapterSpec", "BatchSpec", "OptimSpec", "SpecError", "TrainSpec"]

Method = Literal["lora", "qlora", "dora", "full"]
METHODS = ("lora", "qlora", "dora", "full")
INITS = ("default", "eva", "orthogonal")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")
SHARDINGS = ("none", "fsdp")
MAX_RANK = 256  # what the store accepts
MAX_SEQUENCE_LENGTH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The adapter's form, as peft.LoraConfig means it. alpha None: twice the rank. Ignored by method "full"."""

    section: ClassVar[str] = "adapter"
    rank: int = 16
    alpha: float | None = None
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init: str = "default"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _set(self, "rank", check.whole("adapter.rank", self.rank, 1, MAX_RANK))
        if self.alpha is not None:
            _set(self, "alpha", check.number("adapter.alpha", self.alpha, 0, 1e6, open_low=True))
        _set(self, "target_modules", check.modules("adapter.target_modules", self.target_modules))
        check.flag("adapter.rslora", self.rslora)
        ranks = check.pattern("adapter.rank_pattern", self.rank_pattern, 1, MAX_RANK, integral=True)
        _set(self, "rank_pattern", ranks)
        alphas = check.pattern("adapter.alpha_pattern", self.alpha_pattern, 1e-6, 1e6, integral=False)
        _set(self, "alpha_pattern", alphas)
        check.one_of("adapter.init", self.init, INITS)
        _set(self, "dropout", check.number("adapter.dropout", self.dropout, 0, 0.95))
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.rank, *self.rank_pattern.values())):
            raise SpecError("adapter.rank", self.rank, 'even with init "orthogonal" (in rank_pattern, too)')

    @property
    def scaled_alpha(self) -> float:
        """The alpha that PEFT gets."""
        return float(2 * self.rank) if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """AdamW and its schedule. warmup_fraction: of all steps. max_steps, where given, replaces epochs."""

    section: ClassVar[str] = "optim"
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_fraction: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 3
    max_steps: int | None = None

    def __post_init__(self) -> None:
        _set(self, "learning_rate", check.number("optim.learning_rate", self.learning_rate, 0, 100, open_low=True))
        check.one_of("optim.schedule", self.schedule, SCHEDULES)
        _set(self, "warmup_fraction", check.number("optim.warmup_fraction", self.warmup_fraction, 0, 1))
        _set(self, "weight_decay", check.number("optim.weight_decay", self.weight_decay, 0, 10))
        _set(self, "max_grad_norm", check.number("optim.max_grad_norm", self.max_grad_norm, 0, 1e6, open_low=True))
        check.whole("optim.epochs", self.epochs, 1, 1000)
        if self.max_steps is not None:
            check.whole("optim.max_steps", self.max_steps, 1, 10_000_000)


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """How examples become steps and forwards.

    examples: per optimizer step, over all ranks. tokens: where given, a step takes as many whole examples as fit (at
    least one), instead of `examples`. micro_tokens: at most so many tokens in one forward of one rank (None:
    max_sequence_length); it sets the memory, not the result. packing False: every example is a forward of its own.
    """

    section: ClassVar[str] = "batch"
    examples: int = 16
    tokens: int | None = None
    micro_tokens: int | None = None
    max_sequence_length: int = 2048
    packing: bool = True

    def __post_init__(self) -> None:
        check.whole("batch.examples", self.examples, 1, 65536)
        if self.tokens is not None:
            check.whole("batch.tokens", self.tokens, 1, 1 << 30)
        check.whole("batch.max_sequence_length", self.max_sequence_length, 8, MAX_SEQUENCE_LENGTH)
        if self.micro_tokens is not None:
            check.whole("batch.micro_tokens", self.micro_tokens, self.max_sequence_length, 1 << 24)
        check.flag("batch.packing", self.packing)

    @property
    def forward_tokens(self) -> int:
        """The most tokens one forward holds."""
        return self.micro_tokens or self.max_sequence_length


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One run. Paths may be relative to the working directory (from_yaml: to the YAML file's folder).

    validation None: a part of the data is held out. mix: general data, of which mix_fraction of the examples is added.
    precision "bfloat16": frozen weights bf16, trained weights fp32, matrix products in bf16. eval_every: in
    steps; None: once an epoch. keep_best, keep_last: checkpoints kept by validation loss, and the newest.
    early_stopping_patience: evaluations without a better loss until the run ends; 0: never.
    """

    base: Path
    data: Path
    validation: Path | None = None
    mix: Path | None = None
    mix_fraction: float = 0.05
    method: Method = "lora"
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    batch: BatchSpec = field(default_factory=BatchSpec)
    seed: int = 0
    precision: str = "float32"
    checkpointing: bool = False
    early_stopping_patience: int = 3
    eval_every: int | None = None
    keep_best: int = 2
    keep_last: int = 1
    sharding: str = "none"
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        for name in _PATHS:
            if getattr(self, name) is not None or name in ("base", "data"):
                _set(self, name, check.path(name, getattr(self, name)))
        _set(self, "mix_fraction", check.number("mix_fraction", self.mix_fraction, 0, 0.5))
        for name, kind in _SECTIONS.items():
            if not isinstance(getattr(self, name), kind):
                raise SpecError(name, getattr(self, name), "an object")
        self._check_choices()
        self._check_counts()
        self._check_together()

    def _check_choices(self) -> None:
        check.one_of("method", self.method, METHODS)
        check.one_of("precision", self.precision, PRECISIONS)
        check.one_of("sharding", self.sharding, SHARDINGS)
        check.flag("checkpointing", self.checkpointing)
        check.flag("reshard_after_forward", self.reshard_after_forward)

    def _check_counts(self) -> None:
        check.whole("seed", self.seed, 0, (1 << 32) - 1)
        check.whole("early_stopping_patience", self.early_stopping_patience, 0, 10_000)
        check.whole("keep_best", self.keep_best, 1, 100)
        check.whole("keep_last", self.keep_last, 1, 100)
        if self.eval_every is not None:
            check.whole("eval_every", self.eval_every, 1, 10_000_000)

    def _check_together(self) -> None:
        if self.sharding == "fsdp" and self.method == "dora":
            raise SpecError(
                "method", self.method, 'lora, qlora or full with sharding "fsdp" (DoRA needs whole weights)'
            )
        if self.adapter.init == "eva" and (self.sharding == "fsdp" or self.method == "full"):
            raise SpecError("adapter.init", "eva", 'default or orthogonal with sharding "fsdp" or method "full"')

    @classmethod
    def from_mapping(cls, body: Mapping[str, Any], *, folder: Path | None = None) -> Self:
        """Read a nested object; relative paths are taken from `folder` where it is given. Raises SpecError."""
        values = _known("", body, cls)
        for name in ("base", "data"):
            if name not in values:
                raise SpecError(name, None, "given", code="missing_field")
        for name, kind in _SECTIONS.items():
            if name in values:
                values[name] = kind(**_known(f"{name}.", values[name], kind))
        if folder is not None:
            for name in _PATHS:
                if values.get(name) is not None:
                    values[name] = folder / check.path(name, values[name])
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read a YAML (or JSON) file. Raises SpecError, and OSError where the file cannot be read."""
        try:
            body = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SpecError(str(path), " ".join(str(error).split()), "YAML", code="bad_spec") from error
        return cls.from_mapping(body, folder=path.resolve().parent)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values only, defaults filled in."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    def to_yaml(self) -> str:
        """The resolved spec as text; paths as they are."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)


_PATHS = ("base", "data", "validation", "mix")
_SECTIONS: dict[str, type[Any]] = {"adapter": AdapterSpec, "optim": OptimSpec, "batch": BatchSpec}


def _set(spec: Any, name: str, value: Any) -> None:
    object.__setattr__(spec, name, value)  # a frozen dataclass normalises its own fields once, in __post_init__


def _known(prefix: str, body: Any, kind: type[Any]) -> dict[str, Any]:
    if not isinstance(body, Mapping):
        raise SpecError(prefix.rstrip(".") or "spec", body, "an object", code="bad_field" if prefix else "bad_spec")
    names = [item.name for item in fields(kind)]
    for key in body:
        if key not in names:
            raise SpecError(f"{prefix}{key}", body[key], f"absent; known: {', '.join(names)}", code="unknown_field")
    return dict(body)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader takes the last of two equal keys in silence; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
