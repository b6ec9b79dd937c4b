"""What one training run is: base, data, method and every knob, checked once. Knows no tensors, files are only named.

    TrainSpec.from_yaml(path) -> TrainSpec -> trainer.run        to_mapping() is the inverse of from_mapping()

One optimizer step always consumes the same examples: `batch.examples` of them (or as many as fit `batch.tokens`), in an
order that seed and epoch alone decide. They are packed into forwards of at most `batch.micro_tokens` tokens, which the
ranks share out. So neither the size of a forward nor the number of ranks changes what is computed; the number of
accumulated forwards follows and is not a knob.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

from adapters_store.dialects.catalog import DIALECTS
from adapters_store.errors import InputRefused
from adapters_store.format.chat_fields import ADAPTER_DTYPES
from adapters_store.format.config import MAX_INVOCATION_TOKENS
from adapters_store.parsing.patterns import PLAIN_KEY
from adapters_store.parsing.strict_json import shown
from adapters_store.parsing.strict_yaml import load_yaml
from adapters_store.parsing.template_sandbox import MAX_TEMPLATE_BYTES

Method = Literal["lora", "qlora", "dora", "full"]
Objective = Literal["supervised", "dpo"]
DPO_RATE = 5e-5  # of a learning rate that is not given; supervised training takes four times as much
TooLong = Literal["refuse", "truncate", "drop"]
MAX_RANK = 256  # what the store accepts
MAX_ENTRIES = 8192  # as the store allows in target_modules and in each pattern
MAX_FORWARD_TOKENS = 1 << 24
MAX_INVOCATION_CHARS = 1024
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # no tokenizer takes one
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class SpecError(InputRefused):
    """One field of a spec is not usable. `code` is "unknown_field", "missing_field", "bad_field" or "bad_spec";
    `param` is the field's dotted path, e.g. "adapter.rank". Not a ValueError: pydantic would wrap it."""

    param: str

    def __init__(self, field: str, value: object, limit: str, *, code: str = "bad_field") -> None:
        super().__init__(code, f"{field}: must be {limit}, got {shown(value)}", param=field)


def _whole(low: int, high: int, default: Any = ...) -> Any:
    return Field(default, ge=low, le=high, description=f"a whole number from {low} to {high}")


def _number(low: float, high: float, default: Any = ..., *, open_low: bool = False) -> Any:
    if open_low:
        return Field(default, gt=low, le=high, description=f"a number above {low:g} to {high:g}")
    return Field(default, ge=low, le=high, description=f"a number from {low:g} to {high:g}")


def _float(value: object) -> object:
    """YAML 1.1 reads "2e-4" as text: it is a number here."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _path(value: object, info: ValidationInfo) -> Path:
    """A path, relative to the context's folder if there is one. Whether it exists is checked when the run starts."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise SpecError(str(info.field_name), value, "a path")
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / os.path.expanduser(value)  # Path.expanduser raises for an unknown user


def _modules(value: object, info: ValidationInfo) -> str | tuple[str, ...]:
    """ "all-linear", or the names (or dotted ends) of linear layers: a list, never a regular expression."""
    field = f"adapter.{info.field_name}"
    if value == "all-linear":
        return "all-linear"
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_ENTRIES:
        raise SpecError(field, value, f'"all-linear" or a list of 1 to {MAX_ENTRIES} module names')
    for name in value:
        if not isinstance(name, str) or PLAIN_KEY.fullmatch(name) is None or name.startswith("^"):
            raise SpecError(field, name, "a list of plain module names (letters, digits, . _ -)")
    return tuple(value)


def _invocation(value: object) -> str | tuple[int, ...]:
    """Token ids, or a text that a run replaces by its tokens on its base."""
    if isinstance(value, str) and 1 <= len(value) <= MAX_INVOCATION_CHARS and not _LONE_SURROGATE.search(value):
        return value
    if isinstance(value, list | tuple) and 1 <= len(value) <= MAX_INVOCATION_TOKENS and all(map(_is_token_id, value)):
        return tuple(value)
    limit = f"1 to {MAX_INVOCATION_TOKENS} token ids, or a text of at most {MAX_INVOCATION_CHARS} characters"
    raise SpecError("adapter.alora_invocation_tokens", value, limit)


def _is_token_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


Float = Annotated[float, BeforeValidator(_float)]
FilePath = Annotated[Path, PlainValidator(_path)]
_AS_LIST = PlainSerializer(lambda names: names if isinstance(names, str) else list(names))
Modules = Annotated[str | tuple[str, ...], PlainValidator(_modules), _AS_LIST]
InvocationTokens = Annotated[str | tuple[int, ...], PlainValidator(_invocation), _AS_LIST]
# Module name (or its dotted end) -> number. Regular expressions are refused, as the store refuses them.
_Name = Annotated[str, StringConstraints(pattern=rf"\A(?:{PLAIN_KEY.pattern})\z")]
_PATTERN: Any = Field({}, max_length=MAX_ENTRIES, description=f"an object of at most {MAX_ENTRIES} module names")


class _Spec(BaseModel):
    """Checked when made, from a file or in code alike. Raises SpecError for the first field that is not usable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    section: ClassVar[str] = ""

    @model_validator(mode="wrap")
    @classmethod
    def _first_error(cls, body: Any, check: Callable[[Any], Self]) -> Self:
        try:
            return check(body)
        except ValidationError as error:
            raise _spec_error(cls, error) from None


class AdapterSpec(_Spec):
    """The adapter's form, as peft.LoraConfig means it. alpha None: twice the rank. Ignored by method "full".

    alora_invocation_tokens: makes it an activated LoRA; a text means its tokens.
    """

    section = "adapter"
    rank: int = _whole(1, MAX_RANK, 16)
    alpha: Float | None = _number(0, 1e6, None, open_low=True)
    target_modules: Modules = "all-linear"
    rslora: bool = False
    rank_pattern: dict[_Name, Annotated[int, _whole(1, MAX_RANK)]] = _PATTERN
    alpha_pattern: dict[_Name, Annotated[Float, _number(1e-6, 1e6)]] = _PATTERN
    init: Literal["default", "eva", "orthogonal"] = "default"
    dropout: Float = _number(0, 0.95, 0.0)
    alora_invocation_tokens: InvocationTokens | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        ranks = {"rank": self.rank, **{f"rank_pattern.{name}": rank for name, rank in self.rank_pattern.items()}}
        for field, rank in ranks.items():
            if self.init == "orthogonal" and rank % 2:
                raise SpecError(f"adapter.{field}", rank, 'even with init "orthogonal"')
        return self

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens that switch it on; none for an ordinary adapter. `trainer.run` has replaced a text."""
        assert not isinstance(self.alora_invocation_tokens, str), "a text is replaced by its tokens first"
        return self.alora_invocation_tokens or ()

    @property
    def scaled_alpha(self) -> float:
        """The alpha that PEFT gets."""
        return float(2 * self.rank) if self.alpha is None else self.alpha


class OptimSpec(_Spec):
    """AdamW and its schedule. warmup_fraction: of all steps. max_steps, if given, replaces epochs. moments "8bit": two
    bytes of state a trained parameter instead of eight (package bitsandbytes)."""

    section = "optim"
    learning_rate: Float = _number(0, 100, 2e-4, open_low=True)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Float = _number(0, 1, 0.03)
    weight_decay: Float = _number(0, 10, 0.0)
    max_grad_norm: Float = _number(0, 1e6, 1.0, open_low=True)
    epochs: int = _whole(1, 1000, 3)
    max_steps: int | None = _whole(1, 10_000_000, None)
    moments: Literal["float32", "8bit"] = "float32"


class BatchSpec(_Spec):
    """How examples become steps and forwards.

    examples: per optimizer step, over all ranks. tokens: if given, a step takes as many whole examples as fit (at
    least one), instead of `examples`. micro_tokens: the most tokens in one forward of one rank (None:
    max_sequence_length); it sets the memory, not the result. packing False: every example is a forward of its own.
    too_long: what happens to an example of more than max_sequence_length tokens; truncate keeps its first tokens.
    """

    section = "batch"
    examples: int = _whole(1, 65536, 16)
    tokens: int | None = _whole(1, 1 << 30, None)
    micro_tokens: int | None = _whole(8, MAX_FORWARD_TOKENS, None)
    max_sequence_length: int = _whole(8, 1 << 20, 2048)
    too_long: TooLong = "refuse"
    packing: bool = True

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.micro_tokens is not None and self.micro_tokens < self.max_sequence_length:
            limit = f"a whole number from {self.max_sequence_length} to {MAX_FORWARD_TOKENS}"
            raise SpecError("batch.micro_tokens", self.micro_tokens, limit)
        return self

    @property
    def forward_tokens(self) -> int:
        """The most tokens one forward holds."""
        return self.micro_tokens or self.max_sequence_length


class DpoSpec(_Spec):
    """Direct preference optimisation. beta: how much it costs to leave the reference, the base with the adapter off."""

    section = "dpo"
    beta: Float = _number(0, 100, 0.1, open_low=True)


Rules = Mapping[str, tuple[object, ...]]  # a field's dotted path -> the values that it may have
_LORA, _NOT_SHARDED, _ABSENT, _UNTRAINED_START = ("lora", "qlora"), ("none",), (None,), ("default", "orthogonal")
_WITH_INVOCATION: Rules = {
    "method": _LORA,
    "objective": ("supervised",),
    "mix": _ABSENT,
    "initial_adapter": _ABSENT,
    "sharding": _NOT_SHARDED,
    "adapter.init": _UNTRAINED_START,
}
_WITH_INITIAL_ADAPTER: Rules = {"method": _LORA, "adapter.init": ("default",), "sharding": _NOT_SHARDED}
_WITH_FULL: Rules = {
    "tool_dialect": _ABSENT,  # the base has its own
    "chat_template": _ABSENT,
    "adapter_dtype": _ABSENT,
    "adapter.init": _UNTRAINED_START,
}
_WITH_FSDP: Rules = {
    "method": ("lora", "qlora", "full"),  # DoRA needs whole weights
    "eval_samples": (0,),
    "optim.moments": ("float32",),
    "adapter.init": _UNTRAINED_START,
}


class TrainSpec(_Spec):
    """One run. Paths may be relative to the working directory (from_yaml: to the YAML file's folder).

    validation None: a part of the data is held out. mix: general data, of which mix_fraction of the examples is added.
    precision "bfloat16": frozen weights bf16, trained weights fp32, matrix products in bf16. eval_every: in steps;
    None: once an epoch, three times in one of 32 steps or more. eval_samples: held-out prompts answered at each
    evaluation, at most 32 tokens each. keep_best, keep_last: checkpoints kept by validation
    loss, and the newest. early_stopping_patience: evaluations without a loss below the best, and the base's, until the
    run ends; 0: never. tool_dialect, chat_template: in which the data's chats are learned and the adapter is served;
    None: the base's own. adapter_dtype: in which the adapter is kept and served; None: the base's. initial_adapter: a
    folder in PEFT's format; the run begins with it, in its form. objective "dpo": the data is preference pairs; method
    "dpo" is short for it with "lora".
    """

    base: FilePath
    data: FilePath
    validation: FilePath | None = None
    mix: FilePath | None = None
    mix_fraction: Float = _number(0, 0.5, 0.05)
    method: Method = "lora"
    objective: Objective = "supervised"
    dpo: DpoSpec = DpoSpec()
    adapter: AdapterSpec = AdapterSpec()
    initial_adapter: FilePath | None = None
    optim: OptimSpec = OptimSpec()
    batch: BatchSpec = BatchSpec()
    tool_dialect: str | None = Field(None, description=f"one of {', '.join(DIALECTS)}")
    chat_template: str | None = Field(None, description="the text of a Jinja template")
    adapter_dtype: str | None = Field(None, description=f"{', '.join(ADAPTER_DTYPES)} or absent")
    seed: int = _whole(0, (1 << 32) - 1, 0)
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    early_stopping_patience: int = _whole(0, 10_000, 3)
    eval_every: int | None = _whole(1, 10_000_000, None)
    eval_samples: int = _whole(0, 16, 0)
    keep_best: int = _whole(1, 100, 2)
    keep_last: int = _whole(1, 100, 1)
    sharding: Literal["none", "fsdp"] = "none"
    reshard_after_forward: bool = True

    @model_validator(mode="before")
    @classmethod
    def _fill_in_dpo(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        if body.get("method") == "dpo":
            body = {**body, "method": "lora", "objective": "dpo"}
        optim = body.get("optim", {})
        if body.get("objective") == "dpo" and isinstance(optim, Mapping):
            body = {**body, "optim": {"learning_rate": DPO_RATE, **optim}}
        return body

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for combined, why, rules in (
            (self.objective == "dpo", 'objective "dpo"', {"method": _LORA, "sharding": _NOT_SHARDED, "mix": _ABSENT}),
            (self.adapter.alora_invocation_tokens is not None, "adapter.alora_invocation_tokens", _WITH_INVOCATION),
            (self.initial_adapter is not None, "an initial_adapter", _WITH_INITIAL_ADAPTER),
            (self.method == "full", 'method "full"', _WITH_FULL),
            (self.sharding == "fsdp", 'sharding "fsdp"', _WITH_FSDP),
        ):
            if combined:
                self._require(rules, why)
        if self.tool_dialect is not None and self.tool_dialect not in DIALECTS:
            raise SpecError("tool_dialect", self.tool_dialect, f"one of {', '.join(DIALECTS)}")
        if self.adapter_dtype not in (None, *ADAPTER_DTYPES):
            raise SpecError("adapter_dtype", self.adapter_dtype, f"one of {', '.join(ADAPTER_DTYPES)}, or absent")
        size = len((self.chat_template or "").encode(errors="surrogatepass"))
        if self.chat_template is not None and (not self.chat_template.strip() or size > MAX_TEMPLATE_BYTES):
            raise SpecError("chat_template", self.chat_template, f"text of at most {MAX_TEMPLATE_BYTES} bytes")
        return self

    def _require(self, rules: Rules, why: str) -> None:
        """Raises SpecError for the first field that holds another value than its rule has."""
        for field, fit in rules.items():
            value = attrgetter(field)(self)
            if value not in fit:
                wanted = " or ".join("absent" if each is None else str(each) for each in fit)
                raise SpecError(field, str(value) if isinstance(value, Path) else value, f"{wanted} with {why}")

    @classmethod
    def from_mapping(cls, body: Mapping[str, Any], *, folder: Path | None = None) -> Self:
        """Read a nested object; relative paths are taken from `folder` if it is given. Raises SpecError."""
        if not isinstance(body, Mapping):
            raise SpecError("spec", body, "an object", code="bad_spec")
        return cls.model_validate(dict(body), context={"folder": folder or Path()})

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read a YAML (or JSON) file. Raises SpecError, and OSError if the file cannot be read."""
        try:
            body = load_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SpecError(str(path), " ".join(str(error).split()), "YAML", code="bad_spec") from error
        return cls.from_mapping(body, folder=path.resolve().parent)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values only, defaults filled in."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved spec as text; paths as they are."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)


_CODES = {"extra_forbidden": "unknown_field", "invalid_key": "unknown_field", "missing": "missing_field"}
_LIMITS = {"bool_type": "true or false", "model_type": "an object"}


def _spec_error(kind: type[_Spec], error: ValidationError) -> SpecError:
    """One of pydantic's errors in the spec's words: unknown fields before missing ones, both before bad values."""
    found = error.errors(include_url=False)
    first = next((each for code in _CODES for each in found if each["type"] == code), found[0])
    code, (name, *inside) = _CODES.get(first["type"], "bad_field"), map(str, first["loc"] or (kind.section,))
    field, value = f"{kind.section}.{name}".lstrip("."), first["input"]
    if code == "unknown_field":
        return SpecError(field, value, f"absent; known: {', '.join(kind.model_fields)}", code=code)
    if code == "missing_field":
        return SpecError(field, None, "given", code=code)
    if first["type"] == "model_type" and not first["loc"]:
        return SpecError(kind.section, value, "an object")
    info = kind.model_fields[name]
    if "[key]" in inside:
        return SpecError(field, value, "an object whose keys are plain module names")
    if inside:
        field, info = f"{field}.{inside[0]}", FieldInfo.from_annotation(get_args(info.annotation)[1])
    limit = _LIMITS.get(first["type"]) or info.description or f"one of {', '.join(get_args(info.annotation))}"
    return SpecError(field, value, limit)
