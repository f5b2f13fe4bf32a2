"""Tokenizers from the files of their folder and no others, within bounds."""

import json
import os
import shutil

import pytest
from transformers import CLIPTokenizer, T5Tokenizer

from latentfm.errors import InputError
from latentfm.models.tokenizers import load_tokenizer

TEXTS = ["a red apple on a white plate", "", "Ünïcode; and 42 dots..."]


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_they_are_transformers_own(tiny_folder, name):
    kind = T5Tokenizer if name == "tokenizer_3" else CLIPTokenizer
    expected, found = kind.from_pretrained(tiny_folder / name), load_tokenizer(tiny_folder / name)
    assert type(found) is kind and found.model_max_length == expected.model_max_length
    for options in ({}, {"padding": "max_length", "max_length": 12, "truncation": True}):
        assert found(TEXTS, **options).input_ids == expected(TEXTS, **options).input_ids


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A function that gives a copy of a tokenizer's folder with its tokenizer_config.json changed."""

    def changed(name="tokenizer", **settings):
        copied = shutil.copytree(tiny_folder / name, tmp_path / name, dirs_exist_ok=True)
        path = copied / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return copied

    return changed


def test_paths_in_a_configuration_are_not_followed(folder, tmp_path):
    before = load_tokenizer(folder())(TEXTS).input_ids
    os.mkfifo(tmp_path / "pipe")
    pipe = str(tmp_path / "pipe")
    after = load_tokenizer(folder(vocab_file=pipe, merges_file=pipe, tokenizer_file=pipe, special_tokens_map_file=pipe, name_or_path=pipe))
    assert after(TEXTS).input_ids == before


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("tokenizer", {"init_inputs": ["x"]}, "sets init_inputs"), ("tokenizer", {"gguf_file": "x"}, "sets gguf_file"),
        ("tokenizer_3", {"extra_ids": 10**9}, "numbers tokens beyond"),
        ("tokenizer", {"added_tokens_decoder": {str(10**12): {}}}, "beyond"),
        ("tokenizer", {"added_tokens_decoder": {"x": {}}}, "cannot be read"), ("tokenizer", {"model_max_length": "x"}, "cannot be read"),
        ("tokenizer", {"model_max_length": 0}, "model_max_length is 0"), ("tokenizer", {"pad_token": 5}, "cannot be read"),
    ],
)  # fmt: skip
def test_settings_that_lead_elsewhere_or_nowhere_are_refused(folder, name, settings, says):
    with pytest.raises(InputError, match=says) as caught:
        load_tokenizer(folder(name, **settings))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_its_vocabulary_is_not_one_of_three_words(folder):
    for name, vocabulary in (("tokenizer", "vocab.json with merges.txt"), ("tokenizer_3", "spiece.model")):
        place = folder(name)
        for file in ("tokenizer.json", "spiece.model", "vocab.json"):
            (place / file).unlink(missing_ok=True)
        with pytest.raises(InputError, match=f"has neither tokenizer.json nor {vocabulary}; its copy is not complete"):
            load_tokenizer(place)
        (place / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
        with pytest.raises(InputError, match="no vocabulary"):
            load_tokenizer(place)
        shutil.rmtree(place)
        with pytest.raises(InputError, match="is missing, and the text encoder beside it"):
            load_tokenizer(place)


def test_special_and_huge_files_are_refused(folder):
    place = folder()
    os.truncate(place / "tokenizer.json", 2**40)
    with pytest.raises(InputError, match="1,099,511,627,776 bytes"):
        load_tokenizer(place)
    (place / "tokenizer.json").unlink()
    os.mkfifo(place / "tokenizer.json")
    with pytest.raises(InputError, match="named pipe"):
        load_tokenizer(place)
