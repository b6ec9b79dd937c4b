from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.request import InvalidRequest
from server.engine.text.chat_options import ChatOptions
from server.engine.text.tokenizer import Tokenizer
from support.models.tokenizer_zoo import ZOO, byte_level, llama2, wrapped

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    wrapped(byte_level()).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3, 10**6]}))
    (path / "config.json").write_text(json.dumps({"eos_token_id": 7, "text_config": {"eos_token_id": 8}}))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def test_end_of_sequence_ids_come_from_generation_config_config_and_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == {0, 3, 7, 8, 1}  # 10**6 is no token of this vocabulary


def test_a_folder_without_configs_has_the_tokenizers_own_end_of_sequence(tmp_path: Path) -> None:
    wrapped(byte_level()).save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).eos_ids == {1}


def test_vocab_size_is_one_more_than_the_highest_id(tokenizer: Tokenizer) -> None:
    core = byte_level()
    assert tokenizer.vocab_size == core.token_to_id("née 中") + 1 == core.get_vocab_size()


def test_encode_and_decode_are_inverse_and_follow_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("The lease ends.", "日本語 👍🏽", "", "née 中 <|user|>"):
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode([1], skip_special_tokens=False) == "</s>"


def test_truncation_and_padding_stored_with_the_tokenizer_do_not_touch_prompts(tmp_path: Path) -> None:
    core = byte_level()
    core.enable_truncation(4)
    core.enable_padding(length=64)
    wrapped(core).save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for text in ("x" * 100, "x"):
        assert len(tokenizer.encode(text)) == len(byte_level().encode(text).ids)


def test_what_others_do_to_the_transformers_tokenizer_does_not_touch_ours() -> None:
    original = wrapped(byte_level())
    tokenizer = Tokenizer(original)
    expected = tokenizer.encode("x" * 100)
    original("x" * 100, truncation=True, max_length=5)
    assert tokenizer.encode("x" * 100) == expected


def test_a_lone_surrogate_is_a_named_refusal(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate at character 2") as caught:
        tokenizer.encode("ab\ud800", param="prompt")
    assert caught.value.param == "prompt"


def test_chat_is_what_the_template_renders(tokenizer: Tokenizer, folder: Path) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer.encode_chat(CHAT)
    assert ids == reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<|user|>Hi</s><|assistant|>")
    closed = tokenizer.encode_chat(CHAT, ChatOptions(add_generation_prompt=False))
    assert tokenizer.decode(closed, skip_special_tokens=False).endswith("Hi</s>")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least 1"),
        ([{"role": "wizard", "content": "x"}], "unknown role wizard"),
        ([{"content": "x"}], "refused"),
        ([{"role": "user", "content": None}], "refused"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
    ],
)
def test_messages_that_cannot_be_rendered_are_named_refusals(
    tokenizer: Tokenizer, messages: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        tokenizer.encode_chat(messages)
    assert caught.value.param == "messages"


def test_a_model_without_a_chat_template_says_so() -> None:
    tokenizer = Tokenizer(wrapped(byte_level(), chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat(CHAT)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    mark = tmp_path / "reached"
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}" + str(mark)
    with pytest.raises(InvalidRequest, match="refused"):
        Tokenizer(wrapped(byte_level(), chat_template=attack)).encode_chat(CHAT)


def test_many_threads_may_use_one_tokenizer() -> None:
    tokenizer = Tokenizer(wrapped(llama2()))
    texts = ["▁The▁lease" * count + "日👍é" for count in range(1, 9)]
    expected = {text: (tokenizer.encode(text), tokenizer.encode_chat([{**CHAT[1], "content": text}])) for text in texts}
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for text in (rng.choice(texts) for _ in range(150)):
            ids, chat = expected[text]
            if tokenizer.encode(text) != ids or tokenizer.encode_chat([{**CHAT[1], "content": text}]) != chat:
                wrong.append(text)
            if tokenizer.decode(ids) != text.replace("▁", " ").removeprefix(" "):
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_every_family_of_the_zoo_loads(tmp_path: Path) -> None:
    for name, build in ZOO.items():
        wrapped(build()).save_pretrained(tmp_path / name)
        tokenizer = Tokenizer.load(tmp_path / name)
        ids = tokenizer.encode("a日b", add_special_tokens=False)
        assert tokenizer.decode(ids) == build().decode(ids)
