from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.engine.text.detokenizer import Detokenizer
from server.engine.text.token_text import TokenTexts
from support.models.tokenizer_zoo import SAMPLE_TEXT, SPECIAL, ZOO

CORES = {name: build() for name, build in ZOO.items()}
TABLES = {name: TokenTexts(core) for name, core in CORES.items()}
BYTE_ZERO = len(SPECIAL) + 1  # id of <0x00> in the SentencePiece-like ones


def stream(token_texts: TokenTexts, ids: list[int], prompt_ids: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(token_texts, prompt_ids or [])
    return [*(detokenizer.append(token_id) for token_id in ids), detokenizer.flush()]


def random_ids(core: Tokenizer, rng: random.Random, length: int) -> list[int]:
    size = core.get_vocab_size() + 3  # some ids have no token, as in a padded vocabulary
    return [rng.randrange(size) for _ in range(length)]


def is_byte(core: Tokenizer, token_id: int) -> bool:
    return (core.id_to_token(token_id) or "").startswith("<0x")


def decode_runs_apart(core: Tokenizer, ids: list[int]) -> str:
    """The specification for byte fallback: in each run of byte tokens complete characters count, other bytes do not."""
    words = []
    for token_id in (id_ for id_ in ids if core.decode([id_], skip_special_tokens=False) and id_ >= len(SPECIAL)):
        token = core.id_to_token(token_id)
        if is_byte(core, token_id) and words and isinstance(words[-1], bytearray):
            words[-1].append(int(token[3:5], 16))
        else:
            words.append(bytearray([int(token[3:5], 16)]) if is_byte(core, token_id) else token.replace("▁", " "))
    return "".join(word if isinstance(word, str) else replace_each_byte(bytes(word)) for word in words)


def replace_each_byte(raw: bytes) -> str:
    text = ""
    while raw:
        for length in range(1, 5):
            try:
                text += raw[:length].decode()
            except UnicodeDecodeError:
                continue
            raw = raw[length:]
            break
        else:
            text, raw = text + "\ufffd", raw[1:]
    return text


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "words"])
@given(seed=st.integers(0, 2**32), length=st.integers(0, 30))
@settings(max_examples=300)
def test_joined_deltas_of_random_ids_are_the_decoded_whole(name: str, seed: int, length: int) -> None:
    ids = random_ids(CORES[name], random.Random(seed), length)
    assert "".join(stream(TABLES[name], ids)) == CORES[name].decode(ids)


BYTE_RUNS = st.text(st.sampled_from("é日👍\n a"), max_size=4).map(str.encode) | st.sampled_from(
    [b"\xf0\x9f\x91", b"\xff"]
)


@pytest.mark.parametrize("name", ["llama2", "gemma"])
@given(seed=st.integers(0, 2**32), runs=st.lists(BYTE_RUNS, max_size=8))
@settings(max_examples=300)
def test_byte_runs_of_whole_characters_or_of_one_broken_one_are_the_decoded_whole(
    name: str, seed: int, runs: list[bytes]
) -> None:
    core, rng, ids = CORES[name], random.Random(seed), []
    others = [id_ for id_ in range(core.get_vocab_size()) if not is_byte(core, id_) and id_ >= len(SPECIAL)]
    for run in runs:
        ids += [BYTE_ZERO + byte for byte in run]
        ids += [rng.choice(others) for _ in range(rng.randrange(1, 3))]
    ids += [BYTE_ZERO + byte for byte in runs[0]] if runs else []
    assert "".join(stream(TABLES[name], ids)) == core.decode(ids)


@given(seed=st.integers(0, 2**32), length=st.integers(0, 30))
@settings(max_examples=500)
def test_byte_fallback_of_random_ids_keeps_whole_characters_and_replaces_each_other_byte(
    seed: int, length: int
) -> None:
    core, rng = CORES["gemma"], random.Random(seed)
    characters = [BYTE_ZERO + byte for byte in "é日👍".encode()]
    ids = [i if rng.random() < 0.4 else rng.choice(characters) for i in random_ids(core, rng, length)]
    assert "".join(stream(TABLES["gemma"], ids)) == decode_runs_apart(core, ids)


@pytest.mark.parametrize("name", ["byte_level", "llama2", "gemma"])
def test_text_in_every_script_streams_exactly(name: str) -> None:
    for text in SAMPLE_TEXT:
        source = text if name == "byte_level" else text.replace(" ", "▁")
        ids = CORES[name].encode(source).ids
        assert "".join(stream(TABLES[name], ids)) == text == CORES[name].decode(ids)


def test_a_character_split_over_tokens_appears_once_and_whole() -> None:
    core = CORES["byte_level"]
    ids = [core.token_to_id(letter) for letter in ("ð", "Ł", "ĳ", "į")]  # f0 9f 91 8d
    assert stream(TABLES["byte_level"], ids) == ["", "", "", "👍", ""]
    ids = [BYTE_ZERO + byte for byte in "👍".encode()]
    assert stream(TABLES["llama2"], ids) == ["", "", "", "👍", ""]


def test_bytes_that_never_complete_hold_up_nothing_and_are_not_lost() -> None:
    token_texts, core = TABLES["byte_level"], CORES["byte_level"]
    lead, letter = core.token_to_id("ð"), core.token_to_id("a")
    assert stream(token_texts, [lead, letter, lead]) == ["", "\ufffda", "", "\ufffd"]
    assert stream(token_texts, [lead] * 4) == ["", "\ufffd", "\ufffd", "\ufffd", "\ufffd"]
    assert stream(TABLES["gemma"], [BYTE_ZERO + 0xE4, CORES["gemma"].token_to_id("a")]) == ["", "\ufffda", ""]


def test_a_run_of_byte_tokens_streams_character_by_character() -> None:
    deltas = stream(TABLES["llama2"], [BYTE_ZERO + byte for byte in "ខ្មែ\n".encode()])
    assert [delta for delta in deltas if delta] == ["ខ", "្", "ម", "ែ", "\n"]


def test_special_tokens_and_unknown_ids_have_no_text_even_inside_a_character() -> None:
    core = CORES["byte_level"]
    ids = [core.token_to_id("Ã"), core.token_to_id("</s>"), 10_000, core.token_to_id("©")]
    assert stream(TABLES["byte_level"], ids) == ["", "", "", "é", ""]


@pytest.mark.parametrize("name", ["llama2", "metaspace", "words"])
def test_output_that_begins_a_text_loses_its_first_space_and_one_that_continues_keeps_it(name: str) -> None:
    core, token_texts = CORES[name], TABLES[name]
    mark = "" if name == "words" else "▁"
    ids = [core.token_to_id(mark + "lease" if mark else "s"), core.token_to_id("a")]
    prompt = [core.token_to_id("<s>"), core.token_to_id("b")]
    alone, continued = "".join(stream(token_texts, ids)), "".join(stream(token_texts, ids, prompt))
    assert alone == core.decode(ids)
    assert continued == " " + alone
    assert core.decode(prompt) + continued == core.decode(prompt + ids)
    assert "".join(stream(token_texts, ids, prompt[:1])) == alone  # special tokens have no text to continue


def test_token_bytes_are_exact_and_token_texts_never_collide() -> None:
    for name in ("byte_level", "gemma"):
        core, token_texts = CORES[name], TABLES[name]
        ids = core.encode("日本 👍🏽 née").ids
        assert b"".join(map(token_texts.token_bytes, ids)).decode() == "日本 👍🏽 née"
    texts = [TABLES["byte_level"].display(token_id) for token_id in range(CORES["byte_level"].get_vocab_size())]
    assert len(set(texts)) == len(texts)
    assert TABLES["gemma"].display(BYTE_ZERO + 0xE4) == "bytes:\\xe4"
    assert TABLES["gemma"].display(0) == "<s>"
    assert TABLES["gemma"].token_bytes(99_999) == b""


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
    ],
)
def test_a_decoder_that_cannot_be_followed_token_by_token_is_refused_by_name(decoder: decoders.Decoder) -> None:
    core = Tokenizer(models.BPE({"a": 0}, []))
    core.decoder = decoder
    with pytest.raises(ValueError, match="is not supported"):
        TokenTexts(core)
