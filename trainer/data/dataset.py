"""From a spec to everything that is trained and judged on. Knows the steps' order; each step is elsewhere.

`prepare` gives the same examples for the same spec, files and tokenizer: the gate holds out what the trainer held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.data.encode import Encoder, encode_all
from trainer.data.examples import Examples
from trainer.data.jsonl import DataLimits, Dataset, check_pairs, read_jsonl
from trainer.data.packing import Batches, BatchSettings
from trainer.data.problems import DataRejected, Problem
from trainer.data.split import ENOUGH_VALIDATION, MIN_VALIDATION, Split, apart, mixed, split, without
from trainer.data.template import template_digest
from trainer.data.types import EncodedExample
from trainer.spec import TrainSpec

VALIDATION_LIMITS = DataLimits(min_examples=4)
ENOUGH = "enough_validation"  # in a run's provenance


@dataclass(frozen=True)
class DataFacts:
    """Where the examples came from and how many they are; goes into every provenance. Digests: "sha256:..." or None.

    num_tokens, num_supervised: of the training examples. num_too_long: examples that were cut or dropped.
    template_digest: "none" for a base without a chat template.
    """

    data_digest: str
    validation_digest: str | None
    mix_digest: str | None
    template_digest: str
    kinds: dict[str, int]
    num_duplicates: int
    num_train: int
    num_validation: int
    num_mixed: int
    num_general: int
    num_tokens: int
    num_supervised: int
    num_too_long: int = 0

    def to_mapping(self) -> dict[str, Any]:
        """Without num_too_long if it is 0: provenances of earlier versions do not name it."""
        body = asdict(self)
        if not self.num_too_long:
            del body["num_too_long"]
        return body


@dataclass(frozen=True)
class PreparedData:
    """train: what is learned, mix included. validation: held out of it. general: held out of the mix file, or empty."""

    train: Examples
    validation: Examples
    general: Examples
    facts: DataFacts


def prepare(
    spec: TrainSpec,
    tokenizer: Any,
    *,
    max_model_len: int | None = None,
    num_embeddings: int | None = None,
    enough: int = ENOUGH_VALIDATION,
) -> PreparedData:
    """Check, encode, hold out and mix, by the spec. max_model_len: the base's own limit on a sequence, in tokens.
    num_embeddings: how many token ids the base can read. enough: held-out examples of a small file, see `split`.

    Raises DataRejected (param "data", "validation" or "mix"), and OSError if a file cannot be read.
    """
    length = min(spec.batch.max_sequence_length, max_model_len or spec.batch.max_sequence_length)
    encoder = Encoder(
        tokenizer,
        max_sequence_length=length,
        max_pair_tokens=spec.batch.max_sequence_length,
        num_embeddings=num_embeddings,
        tool_dialect=spec.tool_dialect,
        chat_template=spec.chat_template,
        too_long=spec.batch.too_long,
        invocation=spec.adapter.invocation,
    )
    data, examples = _load(spec.data, "data", encoder, pairs=spec.objective == "dpo")
    parts, validation = _held_out(spec, encoder, examples, enough)
    general, mix = _general(spec, encoder)
    fresh = without(general.train, parts.validation)
    train = mixed(parts.train, fresh, fraction=spec.mix_fraction, seed=spec.seed)
    facts = DataFacts(
        data_digest=data.digest,
        validation_digest=validation.digest if validation else None,
        mix_digest=mix.digest if mix else None,
        template_digest=template_digest(tokenizer, spec.chat_template),
        kinds={str(kind): count for kind, count in sorted(data.kinds.items())},
        num_duplicates=data.num_duplicates,
        num_train=len(train),
        num_validation=len(parts.validation),
        num_mixed=len(train) - len(parts.train),
        num_general=len(general.validation),
        num_tokens=int(train.lengths.sum()),
        num_supervised=train.num_supervised,
        num_too_long=encoder.num_too_long,
    )
    return PreparedData(train, parts.validation, general.validation, facts)


def enough_of(provenance: Mapping[str, Any]) -> int:
    """The `enough` that a run was prepared with; runs of earlier versions do not name it."""
    return int(provenance.get(ENOUGH, MIN_VALIDATION))


def _load(
    path: Path, what: str, encoder: Encoder, limits: DataLimits | None = None, *, pairs: bool = False
) -> tuple[Dataset, Examples]:
    dataset = read_jsonl(path, limits, what=what)
    check_pairs(dataset, wanted=pairs, what=what)
    examples = encode_all(dataset.records(), encoder, what=what)
    if not examples:
        message = f"no example is left: all have more than {encoder.max_sequence_length} tokens"
        raise DataRejected([Problem(0, "too_few_examples", message)], what=what)
    return dataset, examples


def _held_out(spec: TrainSpec, encoder: Encoder, examples: Examples, enough: int) -> tuple[Split, Dataset | None]:
    if spec.validation is None:
        return split(examples, seed=spec.seed, enough=enough), None
    pairs = spec.objective == "dpo"
    dataset, validation = _load(spec.validation, "validation", encoder, VALIDATION_LIMITS, pairs=pairs)
    return apart(examples, validation), dataset


def _general(spec: TrainSpec, encoder: Encoder) -> tuple[Split, Dataset | None]:
    if spec.mix is None:
        return Split(Examples([]), Examples([])), None
    dataset, examples = _load(spec.mix, "mix", encoder)
    return split(examples, seed=spec.seed, what="mix"), dataset


def batches_of(spec: TrainSpec, train: Sequence[EncodedExample], *, rank: int = 0, world_size: int = 1) -> Batches:
    """The run's steps on this rank."""
    settings = BatchSettings(
        examples_per_step=spec.batch.examples,
        tokens_per_step=spec.batch.tokens,
        micro_batch_tokens=spec.batch.forward_tokens,
        packing=spec.batch.packing,
        seed=spec.seed,
        rank=rank,
        world_size=world_size,
    )
    return Batches(train, settings)
