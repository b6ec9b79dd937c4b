"""What an adapter changes of its base's embedding and head as wholes: all rows of its own, or LoRA on the embedding.

Rows of its own are `modules_to_save` in PEFT: they take the place of the base's. Knows shapes and names, no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from adapters_store.base.description import BaseDescription
from adapters_store.base.families import HEAD, TEXT_PREFIXES, family_of, text_side_name
from adapters_store.errors import AdapterRejected
from adapters_store.format.config import LoraConfig
from adapters_store.format.limits import AdapterLimits
from adapters_store.format.safetensors_header import SafetensorsHeader, TensorEntry, rejected
from adapters_store.parsing.patterns import suffixes_at_dots

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class TokenLayer:
    """The embedding or the head of one adapter. rank 0: `entries` is one weight, [vocabulary, hidden], in place of the
    base's. Else LoRA on the embedding: `entries` are A, [rank, vocabulary], and B, [hidden, rank]."""

    name: str
    rank: int
    scale: float
    entries: tuple[TensorEntry, ...]


def token_layers(
    config: LoraConfig, header: SafetensorsHeader, base: BaseDescription, limits: AdapterLimits
) -> tuple[TokenLayer, ...]:
    """The adapter's own embedding, then its own head, where it has them.

    Raises:
        AdapterRejected: unsupported_modules_to_save, unsupported_full_weight, unsupported_embedding_lora,
            unsupported_dora, missing_tensors, untargeted_module, missing_a, missing_b, rank_mismatch, rank_too_large,
            wrong_shape.
    """
    entries = {entry.name.removeprefix(PREFIX): entry for entry in header.tensors if entry.name.startswith(PREFIX)}
    found = [*_whole(config, entries, base), *_lora(config, entries, base, limits)]
    if found and config.alora_invocation_tokens is not None:
        message = f"{found[0].name}: an activated LoRA leaves the rows before its invocation to the base, whose "
        raise rejected("unsupported_modules_to_save", f"{message}embedding and head they need; train it without")
    if len({layer.name for layer in found}) < len(found):
        message = f"{found[-1].name}: has rows of its own (modules_to_save) and LoRA as well; train one of them"
        raise rejected("unsupported_modules_to_save", message)
    return tuple(sorted(found, key=lambda layer: layer.name == HEAD))


def of_text_side(config: LoraConfig, header: SafetensorsHeader) -> tuple[LoraConfig, SafetensorsHeader]:
    """An adapter that was trained on a model of text and pictures, as one of its text model by itself."""
    paths = [entry.name.removeprefix(PREFIX) for entry in header.tensors]
    used = next((pair for pair in TEXT_PREFIXES if any(path.startswith(pair[0]) for path in paths)), None)
    if used is None:
        return config, header
    prefix = used if used[1] != HEAD else TEXT_PREFIXES[1]
    entries = tuple(
        replace(entry, name=PREFIX + text_side_name(path)) if entry.name.startswith(PREFIX) else entry
        for entry, path in zip(header.tensors, paths, strict=True)
    )
    names = {entry.name: path for entry, path in zip(entries, paths, strict=True)}
    if len(names) < len(entries):
        twice = next(path for entry, path in zip(entries, paths, strict=True) if names[entry.name] != path)
        raise rejected("duplicate_tensor", f"{PREFIX}{twice}: the file holds it under two names")
    return replace(config, text_prefix=prefix), replace(header, tensors=entries)


def _whole(config: LoraConfig, entries: dict[str, TensorEntry], base: BaseDescription) -> Iterator[TokenLayer]:
    if not config.modules_to_save:
        return
    head = base.modules.get(HEAD)
    of_base = {
        suffix: name for name in (family_of(base.architecture).embedding, HEAD) for suffix in suffixes_at_dots(name)
    }
    saved = set()
    for name in sorted(config.modules_to_save):
        if head is None or name not in of_base:
            message = f"modules_to_save: {name!r} is neither the embedding nor the head of {base.name}"
            raise AdapterRejected("unsupported_modules_to_save", message, param="modules_to_save")
        saved.add(of_base[name])
    for name in sorted(saved):
        entry = entries.get(f"{name}.weight")
        if entry is None:
            raise rejected("missing_tensors", f"{name}: in modules_to_save, and the file lacks {PREFIX}{name}.weight")
        if f"{name}.lora_A.weight" in entries:
            message = f"{name}: has rows of its own (modules_to_save) and LoRA as well; train one of them"
            raise rejected("unsupported_modules_to_save", message)
        assert head is not None, "checked above"
        _check_rows(entry, (head.out_features, head.in_features))
        yield TokenLayer(name, 0, 1.0, (entry,))


def _check_rows(entry: TensorEntry, shape: tuple[int, int]) -> None:
    if entry.shape != shape:
        message = (
            f"{entry.name}: its size is {list(entry.shape)} and the base's is {list(shape)}: the vocabulary was "
            "changed; merge the adapter into its own base and serve that as a base"
        )
        raise rejected("unsupported_full_weight", message)


def _lora(
    config: LoraConfig, entries: dict[str, TensorEntry], base: BaseDescription, limits: AdapterLimits
) -> Iterator[TokenLayer]:
    if not any("lora_embedding_" in path for path in entries):
        return
    name, head = family_of(base.architecture).embedding, base.modules.get(HEAD)
    if config.use_dora:
        message = f"{name}: DoRA on the embedding is not served; train it with exclude_modules=[{name!r}]"
        raise rejected("unsupported_dora", message)
    found = {side: _side(entries, name, side) for side in "AB"}
    a, b = found["A"], found["B"]
    if head is None or (a is None and b is None):
        return
    if a is None or b is None:
        side, code = ("A", "missing_a") if a is None else ("B", "missing_b")
        raise rejected(code, f"{name}: lora_embedding_{side} is missing")
    if not config.targets(name):
        raise rejected("untargeted_module", f"{name}: has tensors, but the config does not target it")
    rank = config.rank_of(name)
    if rank > limits.max_rank:
        raise rejected("rank_too_large", f"{name}: rank {rank} exceeds max_rank {limits.max_rank}")
    for entry, in_file, wanted, code in (
        (a, a.shape[0], rank, "rank_mismatch"),
        (b, b.shape[1], rank, "rank_mismatch"),
        (a, a.shape[1], head.out_features, "wrong_shape"),
        (b, b.shape[0], head.in_features, "wrong_shape"),
    ):
        if in_file != wanted:
            raise rejected(code, f"{entry.name}: {list(entry.shape)} has {in_file} where {wanted} is needed")
    yield TokenLayer(name, rank, config.scale_of(name), (a, b))


def _side(entries: dict[str, TensorEntry], name: str, side: str) -> TensorEntry | None:
    plain, raw = (entries.get(f"{name}.lora_embedding_{side}{ending}") for ending in ("", ".default"))
    if plain is not None and raw is not None:
        raise rejected("duplicate_tensor", f"{raw.name}: {plain.name} is the same tensor")
    return plain or raw
