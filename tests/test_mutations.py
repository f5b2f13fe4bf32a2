"""Every reader of models, weights and adapters over damaged files: one line that names what is wrong, or the right result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Reader, survives
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from latentfm import LatentFMPipeline
from latentfm.drawing import fingerprint
from latentfm.interchange.completing import completed
from latentfm.interchange.components import load_text_encoders, read_null
from latentfm.interchange.lora.files import open_adapter
from latentfm.interchange.lora.writing import write_peft
from latentfm.interchange.weights import load_part, load_transformer, open_weights
from latentfm.interchange.writers import write_component, write_single
from latentfm.models.folder import check_folder
from latentfm.models.manifest import check_manifest, write_manifest
from latentfm.models.mmdit import MMDiT
from latentfm.models.tokenizers import load_tokenizer
from latentfm.planning.model import read_model

PROMPT = {"prompt": "a red apple", "num_inference_steps": 1, "height": 16, "width": 16, "max_sequence_length": 8, "output_type": "latent"}


def of(*patterns: str):
    """A function that gives the names of a folder's files of these patterns, the manifest left out."""

    def names(folder: Path) -> list[str]:
        found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
        return [path.relative_to(folder).as_posix() for path in found]

    return names


@pytest.fixture(scope="module")
def sound(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """A sound folder for each kind of reader, small ones where the whole pipeline is not needed."""
    place = tmp_path_factory.mktemp("sound")
    stock = shutil.copytree(tiny_folder, place / "pipeline")
    (stock / "latentfm.json").write_text(json.dumps({"format": 1, "max_sequence_length": 8}))
    pipe = LatentFMPipeline.from_pretrained(stock)
    pipe.null.parts(8)
    pipe.null.save(stock)
    saved = shutil.copytree(stock, place / "saved")
    write_manifest(saved)
    single = place / "single"
    single.mkdir()
    write_single(single / "all.safetensors", open_weights(stock), "original", None)
    sharded = place / "sharded"
    write_component(sharded, "transformer", open_weights(stock).parts["transformer"], {}, None, 50_000, lambda _: None)
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "proj_out"], rank_pattern={"proj_out": 1}))
    described = pipe.transformer.peft_config["default"].to_dict()
    LatentFMPipeline.save_lora_weights(
        place / "lora", get_peft_model_state_dict(pipe.transformer), transformer_lora_adapter_metadata=described
    )
    write_peft(place / "peft", open_adapter(place / "lora"), None)
    (place / "peft" / "latentfm_manifest.txt").unlink()
    return {"stock": stock, "saved": saved, "single": single, "sharded": sharded, "lora": place / "lora", "peft": place / "peft"}


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return network.state_dict()


def equal(found: Any, expected: Any) -> bool:
    """Whether two results are the same to the bit."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], value) for key, value in expected.items())
    return found == expected


def drawn(folder: Path, verify: bool = False) -> torch.Tensor:
    pipe = LatentFMPipeline.from_pretrained(folder, verify)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**PROMPT, generator=torch.Generator().manual_seed(0)).images


def adapted(folder: Path) -> dict[str, torch.Tensor]:
    """The tiny network's state with the LoRA in `folder`."""
    network = MMDiT(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48,
        caption_projection_dim=32, pooled_projection_dim=40, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    tensors, said = LatentFMPipeline.lora_state_dict(folder, return_lora_metadata=True)
    LatentFMPipeline.load_lora_into_transformer(tensors, network, adapter_name="mine", metadata=said)
    return {name: value for name, value in state(network).items() if "lora" in name}


def converted(folder: Path) -> list[str]:
    weights = completed(open_weights(folder), None)
    return [name for part in weights.parts.values() for name in part.tensors]


def from_single(folder: Path) -> dict[str, torch.Tensor]:
    parts = open_weights(folder / "all.safetensors").parts
    return {name: state(load_part(name, part, torch.float32)) for name, part in parts.items()}


def encoded(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_text_encoders(folder, 48, 40).encode(["a b"], 8).items())


def tokens(folder: Path) -> list[list[int]]:
    texts = ["a red apple", "ünïcode; and 42 dots..."]
    return [load_tokenizer(folder / name)(texts).input_ids for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]


CONFIGS, WEIGHTS = ("*.json", "*/*config.json"), "*/*.safetensors"
READERS = [  # what reads, of which sound folder, and how many damages by default
    (Reader("plan", read_model, of("transformer/*", "vae/*", "text_encoder*/*", "latentfm.json")), "stock", 60),
    (Reader("check", check_folder, of("*.json", "*/config.json", WEIGHTS)), "stock", 60),
    (Reader("manifest", lambda place: check_manifest(place, True), of("*.txt", "*/config.json")), "saved", 40),
    (Reader("verified", lambda place: drawn(place, True), of("*.json", "*.txt", "*/*", "*.safetensors"), equal), "saved", 40),
    (Reader("draw", drawn, of(*CONFIGS, WEIGHTS, "*.safetensors")), "stock", 60),
    (Reader("text encoders", encoded, of("text_encoder*/*")), "stock", 25),
    (Reader("null condition", lambda place: read_null(place, None), of("null_condition.safetensors")), "stock", 25),
    (Reader("tokenizers", tokens, of("tokenizer*/*")), "stock", 60),
    (Reader("convert", converted, of(*CONFIGS, WEIGHTS)), "stock", 40),
    (Reader("single file", from_single, of("*.safetensors")), "single", 40),
    (Reader("shards", lambda place: state(load_transformer(place)), of("*.json", "*.safetensors")), "sharded", 40),
    (Reader("LoRA", adapted, of("*.safetensors")), "lora", 60),
    (Reader("peft", adapted, of("*.json", "*.safetensors")), "peft", 40),
    (Reader("fingerprint", fingerprint, of("model_index.json")), "stock", 20),
]


def named(entry: tuple[Reader, str, int]) -> str:
    return entry[0].name


@pytest.mark.parametrize("entry", READERS, ids=named)
def test_a_damaged_file_is_explained_or_read_right(entry, sound, tmp_path):
    reader, kind, count = entry
    found = survives(reader, sound[kind], tmp_path, count)
    assert found["refused"] > count // 5  # else the damages are too gentle to say anything


@pytest.mark.slow
@pytest.mark.parametrize("entry", READERS, ids=named)
def test_many_more(entry, sound, tmp_path):
    reader, kind, count = entry
    survives(reader, sound[kind], tmp_path, 4 * count, seed=1)
