"""A GGUF file is a stranger's: what is cut, odd, huge or of another kind is refused before memory is taken."""

from __future__ import annotations

import os
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store.base.converted import header as headers
from adapters_store.base.converted.door import folder_of, opened_gguf
from adapters_store.base.converted.header import STORED, read_header
from adapters_store.base.families import UnsupportedBase
from benchmarks.peers.gguf_files import Q8_0, write_gguf
from server.demo.assets import BASE_FOLDER


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(tmp_path: Path, keys: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3) -> Path:
    body = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    path = tmp_path / "odd.gguf"
    path.write_bytes(body + bytes(-len(body) % 32) + data)
    return path


HUGE = 1 << 60
LLAMA = key("general.architecture", 8, text("llama"))
ODD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda p: _written(p, b""), "cut short"),
    "other letters": (lambda p: _written(p, b"PK\3\4" + bytes(99)), "does not begin with the letters GGUF"),
    "version 1": (lambda p: file_of(p, [], [], version=1), "GGUF version 1; versions 2 and 3"),
    "big-endian": (lambda p: file_of(p, [], [], version=3 << 24), "a big-endian file"),
    "many keys": (lambda p: _written(p, b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE)), f"{HUGE} keys, at most 4096"),
    "many tensors": (lambda p: _written(p, b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0)), f"{HUGE} tensors, at most"),
    "long text": (lambda p: file_of(p, [struct.pack("<Q", HUGE)], []), f"a text of {HUGE} bytes"),
    "long list": (lambda p: file_of(p, [key("a", 9, struct.pack("<IQ", 4, HUGE))], []), "cut short"),
    "long list of texts": (lambda p: file_of(p, [key("a", 9, struct.pack("<IQ", 8, HUGE))], []), "cut short"),
    "list of lists": (lambda p: file_of(p, [key("a", 9, struct.pack("<IQ", 9, 1))], []), "a list of type 9"),
    "unknown type": (lambda p: file_of(p, [key("a", 99, b"")], []), "a value of type 99"),
    "a key twice": (lambda p: file_of(p, [LLAMA, LLAMA], []), "there twice"),
    "not UTF-8": (lambda p: file_of(p, [struct.pack("<Q", 2) + b"\xff\xfe"], []), "is not UTF-8"),
    "odd alignment": (lambda p: file_of(p, [key("general.alignment", 4, struct.pack("<I", 24))], []), "power of two"),
    "no dimensions": (lambda p: file_of(p, [], [tensor("t", (), 0, 0)]), "0 dimensions"),
    "no values": (lambda p: file_of(p, [], [tensor("t", (32, 0), 0, 0)]), r"the shape '?\[0, 32\]"),
    "too many values": (lambda p: file_of(p, [], [tensor("t", (HUGE, HUGE), 0, 0)]), "the shape"),
    "unknown storage": (lambda p: file_of(p, [], [tensor("t", (32,), 39, 0)]), "ggml type 39; read are F32"),
    "broken block": (lambda p: file_of(p, [], [tensor("t", (33,), 8, 0)]), "rows of 33, no multiple of Q8_0's block"),
    "beyond the end": (lambda p: file_of(p, [], [tensor("t", (64,), 0, 0)], bytes(255)), "cut short: the tensor"),
    "one on another": (
        lambda p: file_of(p, [], [tensor("t", (16,), 0, 0), tensor("u", (16,), 0, 32)], bytes(99)),
        "on another one's bytes",
    ),
    "not aligned": (lambda p: file_of(p, [], [tensor("t", (8,), 0, 4)], bytes(99)), "not aligned"),
    "a tensor twice": (
        lambda p: file_of(p, [], [tensor("t", (8,), 0, 0), tensor("t", (8,), 0, 32)], bytes(99)),
        "there twice",
    ),
}


def _written(folder: Path, body: bytes) -> Path:
    path = folder / "odd.gguf"
    path.write_bytes(body)
    return path


@pytest.mark.parametrize("name", ODD)
def test_an_odd_header_is_refused_in_words_that_name_it(name: str, tmp_path: Path) -> None:
    make, words = ODD[name]
    with pytest.raises(UnsupportedBase, match=words):
        read_header(make(tmp_path))


def test_a_file_cut_or_changed_anywhere_is_read_or_refused_and_takes_no_memory(tmp_path: Path) -> None:
    """240 changes, two thirds of them in the header. Nothing but a refusal may come of them."""
    path = write_gguf(BASE_FOLDER, tmp_path / "odd.gguf", Q8_0)
    whole = path.read_bytes()
    header_bytes = read_header(path).tensors[0].start
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dice, refused = random.Random(5), 0
    for _ in range(80):
        for new in (b"\xff" * 8, dice.randbytes(8)):
            at = dice.randrange(header_bytes - 8)
            _patch(path, at, new)
            refused += _is_refused(path)
            _patch(path, at, whole[at : at + 8])
        path.with_suffix(".cut").write_bytes(whole[: dice.randrange(header_bytes)])
        assert _is_refused(path.with_suffix(".cut"))
    assert refused > 20  # most bytes of a header are the vocabulary's words
    os.truncate(path, len(whole) - 1)
    assert _is_refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 256 << 10


def _patch(path: Path, at: int, new: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(new)


def _is_refused(path: Path) -> bool:
    try:
        opened_gguf(path)
    except UnsupportedBase:
        return True
    return False


MORE: dict[str, tuple[dict[str, Any], str]] = {
    "rope scaling": ({"llama.rope.scaling.type": "linear"}, "scaled positions are not read"),
    "its factor": ({"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count"),
    "part of a head": ({"llama.rope.dimension_count": 16}, "but heads have 32"),
    "heads as a list": ({"llama.attention.head_count_kv": [1, 2]}, "must be a whole number"),
    "no heads": ({"llama.attention.head_count": 0}, "must be a whole number from 1"),
    "more layers": ({"llama.block_count": 5}, "tensors, 47 are needed"),
    "layers without end": ({"llama.block_count": 100_000}, "at most 1024"),
    "eps": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be a number above 0"),
    "an adapter": ({"general.type": "adapter"}, "general.type is 'adapter'"),
    "one part": ({"split.count": 3}, "one of '?3'? parts"),
    "its words": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "its cuts": ({"tokenizer.ggml.pre": "new-2027"}, "tokenizer.ggml.pre is 'new-2027'"),
    "template": ({"tokenizer.chat_template": "{% for"}, "the chat template fails"),
    "width": ({"llama.feed_forward_length": 96}, "have another shape than config.json says"),
}


@pytest.mark.parametrize("name", MORE)
def test_what_would_be_computed_otherwise_is_refused_by_its_key(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more, words = MORE[name]
    file = write_gguf(BASE_FOLDER, tmp_path / "odd.gguf", more=more)
    with pytest.raises(UnsupportedBase, match=words) as caught:
        folder_of(file)
    assert str(file) in caught.value.message
    assert [path for path in tmp_path.glob("cache/multilora/bases/*") if path.is_dir()] == []


def test_another_architecture_is_refused_by_its_name(tmp_path: Path) -> None:
    file = write_gguf(BASE_FOLDER, tmp_path / "odd.gguf", arch="qwen2")
    with pytest.raises(UnsupportedBase, match="a GGUF file of the architecture 'qwen2'; only 'llama' is read"):
        folder_of(file)


def test_a_missing_tensor_and_values_that_are_no_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(BASE_FOLDER, tmp_path / "odd.gguf", leave_out="blk.0.ffn_up.weight")
    with pytest.raises(UnsupportedBase, match="37 tensors, 38 are needed"):
        folder_of(file)
    file = write_gguf(BASE_FOLDER, tmp_path / "odd.gguf")
    last = read_header(file).tensors[-1]
    with file.open("r+b") as stream:
        stream.seek(last.start)
        stream.write(b"\xff\xff\xff\xff")
    with pytest.raises(UnsupportedBase, match="values that are not finite"):
        folder_of(file)


def test_the_sizes_of_blocks_are_ggmls() -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for stored in STORED.values():
        kind = GGMLQuantizationType(stored.number)
        assert (kind.name, GGML_QUANT_SIZES[kind]) == (stored.name, (stored.block, stored.num_bytes))


def test_a_header_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_HEADER_BYTES", 1 << 20)
    file = file_of(tmp_path, [key("a", 9, struct.pack("<IQ", 0, 2 << 20) + bytes(2 << 20))], [])
    with pytest.raises(UnsupportedBase, match="a header of more than 1 MiB"):
        read_header(file)
