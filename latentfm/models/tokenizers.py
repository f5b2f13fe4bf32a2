"""The tokenizers of a pipeline folder, loaded from the files that lie there and from no others."""

from pathlib import Path
from typing import Any

from latentfm.errors import InputError
from latentfm.files import JSON_BYTES, check_regular, read_json, reading
from latentfm.models.encoders import ENCODERS, Family
from latentfm.models.stored import names_in
from latentfm.words import shown

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model",
    "chat_template.jinja",
)  # fmt: skip
MOST_TOKENS = 2**20  # a vocabulary; T5's has 32,100
ELSEWHERE = ("init_inputs", "gguf_file", "tokenizer_object", "fast_tokenizer_files")  # settings that name code, or other files


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, which is named tokenizer, tokenizer_2 or tokenizer_3. Raises InputError when it is damaged."""
    import transformers

    family = next(encoder.family for encoder in ENCODERS if encoder.tokenizer == folder.name)
    kind = getattr(transformers, family.tokenizer)
    check_files(folder, family)
    places = {key: str(folder / name) for key, name in kind.vocab_files_names.items() if (folder / name).is_file()}
    with reading(folder, "copy the folder again"):
        try:
            tokenizer = kind.from_pretrained(folder, local_files_only=True, **places)
            length = tokenizer.model_max_length
            if type(length) not in (int, float) or not length >= 2:
                raise ValueError(f"its model_max_length is {shown(length, 80)}")
            tokenizer(["a word"], padding="max_length", max_length=16, truncation=True)
        except BaseException as error:  # the tokenizers package, written in Rust, raises Exception itself, or panics with none
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise ValueError(str(error)) from error
    for how in ("local_files_only", "is_local"):  # it was loaded, which transformers would save with it
        tokenizer.init_kwargs.pop(how, None)
    return tokenizer


def check_files(folder: Path, family: Family) -> None:
    """Raises InputError unless `folder` holds a vocabulary for a tokenizer of this family, in files that may be opened."""
    if not folder.is_dir():
        raise InputError(f"{shown(folder)} is missing, and the text encoder beside it cannot read without; its copy is not complete")
    names = [name for name in names_in(folder) if name in FILES]
    if not any(set(needed) <= set(names) for needed in family.vocabularies):
        ways = " nor ".join(" with ".join(needed) for needed in family.vocabularies)
        raise InputError(f"{shown(folder)} has neither {ways}; its copy is not complete")
    with reading(folder, "copy the folder again"):
        found = {name: read_json(folder / name) for name in names if name.endswith(".json")}
        for name in names:
            if (size := check_regular(folder / name).st_size) > JSON_BYTES:
                raise ValueError(f"{name} has {size:,} bytes, the most that is read is {JSON_BYTES:,}")
    config, whole = found.get("tokenizer_config.json", {}), found.get("tokenizer.json")
    for key in ELSEWHERE:
        if config.get(key):
            raise InputError(f"{shown(folder / 'tokenizer_config.json')} sets {key}, which is not read here; remove it there")
    with reading(folder, "copy the folder again"):
        if whole is not None and not whole["model"]["vocab"]:
            raise ValueError("tokenizer.json has no vocabulary")
        numbers = [int(number) for number in config.get("added_tokens_decoder") or {}]
        numbers += [number for number in found.get("added_tokens.json", {}).values()]
        numbers += [token["id"] for token in (whole or {}).get("added_tokens") or []]
        numbers += [config.get("extra_ids", 0)]
        if not all(type(number) is int and 0 <= number <= MOST_TOKENS for number in numbers):
            raise ValueError(f"it numbers tokens beyond the {MOST_TOKENS:,} that are read")
