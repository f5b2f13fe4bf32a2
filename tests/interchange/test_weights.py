"""Models wherever they lie: the same network from every form, what is missing taken from a folder, and everything else refused."""

import json
import logging
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import full_vocabulary

from latentfm import LatentFMPipeline
from latentfm.errors import InputError
from latentfm.files import whole_or_nothing
from latentfm.interchange.completing import completed
from latentfm.interchange.recognise import LORA, MMDIT, recognise
from latentfm.interchange.weights import load_transformer, open_weights
from latentfm.interchange.writers import write_component, write_pipeline, write_single
from latentfm.models.mmdit import MMDiT


@pytest.fixture(scope="module")
def single(tiny_folder, tmp_path_factory) -> Path:
    """The tiny pipeline as a single file in the original naming, written here."""
    path = tmp_path_factory.mktemp("single") / "all.safetensors"
    write_single(path, open_weights(tiny_folder), "original", None)
    return path


@pytest.fixture(scope="module")
def foreign(single) -> Path:
    """The same as others write it: no word about its configurations; with names that no network reads."""
    tensors = load_file(single)
    tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    tensors["text_encoders.clip_g.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, single.with_name("foreign.safetensors"), metadata={"modelspec.title": "mine", "modelspec.hash_sha256": "0x1"})
    return single.with_name("foreign.safetensors")


def altered(file: Path, tmp_path: Path, change, metadata: dict | None = None) -> Path:
    """A copy of `file` after `change(tensors)`, without its metadata."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "altered.safetensors", metadata=metadata)
    return tmp_path / "altered.safetensors"


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def forms(tiny_folder, single, foreign, tmp_path_factory):
    """The tiny transformer in every form: name -> path."""
    place = tmp_path_factory.mktemp("forms")
    prefix = "model.diffusion_model."
    tensors = {name.removeprefix(prefix): value for name, value in load_file(single).items() if name.startswith(prefix)}
    save_file(tensors, place / "bare.safetensors")
    save_file({f"diffusion_model.{name}": value for name, value in tensors.items()}, place / "short.safetensors")
    state = state_of(tiny_folder)
    save_file(state, place / "diffusers.safetensors")
    save_file({f"transformer.{name}": value for name, value in state.items()}, place / "prefixed.safetensors")
    part = open_weights(tiny_folder).parts["transformer"]
    write_component(place / "sharded", "transformer", part, {}, None, 50_000, lambda _: None)
    files = ("bare", "short", "diffusers", "prefixed")
    return {name: place / f"{name}.safetensors" for name in files} | {
        "pipeline": tiny_folder, "folder": tiny_folder / "transformer", "sharded": place / "sharded",
        "single": single, "foreign": foreign,
    }  # fmt: skip


class TestLoadTransformer:
    @pytest.mark.parametrize("form", ["bare", "short", "diffusers", "prefixed", "pipeline", "folder", "sharded", "single", "foreign"])
    def test_it_is_the_same_network_from_every_form(self, forms, form, tiny_folder):
        found = load_transformer(forms[form], sample_size=8)
        expected = MMDiT.from_pretrained(tiny_folder, subfolder="transformer")
        assert {k: v for k, v in found.config.items() if not k.startswith("_")} | {"dual_attention_layers": []} == {
            k: v for k, v in expected.config.items() if not k.startswith("_")
        } | {"dual_attention_layers": []}
        assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers())) and not found.training
        given = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 48), torch.randn(1, 40), torch.tensor([500.0])
        with torch.no_grad():
            assert torch.equal(found(*given).sample, expected(*given).sample)

    def test_in_another_dtype(self, single, tiny_folder):
        found = load_transformer(single, torch.bfloat16)
        assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.bfloat16}
        assert torch.equal(found.proj_out.weight, state_of(tiny_folder)["proj_out.weight"].bfloat16())
        assert all(parameter.requires_grad for parameter in found.parameters())

    def test_sample_size_is_128_unless_the_file_or_the_caller_says(self, forms):
        assert load_transformer(forms["bare"]).config.sample_size == 128
        assert load_transformer(forms["single"]).config.sample_size == 8
        assert load_transformer(forms["single"], sample_size=6).config.sample_size == 6

    def test_a_float8_file_is_read(self, tmp_path, single):
        def halve(tensors):
            for name in tensors:
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)

        path = altered(single, tmp_path, halve)
        found = load_transformer(path)
        assert torch.equal(found.proj_out.weight, load_file(path)["model.diffusion_model.final_layer.linear.weight"].float())


def picture(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "height": 16, "width": 16}
    return torch.from_numpy(pipe("a blue car", generator=torch.Generator().manual_seed(0), **settings).images)


def assert_same_picture(one, other) -> None:
    """The same but for rounding: where weights lie in memory decides which instructions read them."""
    first, second = picture(one), picture(other)
    assert (first - second).abs().max() < 1e-5 < first.std()


class TestFromSingleFile:
    def test_the_file_and_a_folder_for_the_tokenizers_make_the_same_picture(self, single, tiny_folder):
        ours = LatentFMPipeline.from_single_file(single, pipeline=tiny_folder)
        assert_same_picture(LatentFMPipeline.from_pretrained(tiny_folder), ours)
        assert ours.scheduler.config.shift == 1.0 and not ours.transformer.training

    def test_a_folder_says_what_a_foreign_file_does_not(self, foreign, tiny_folder):
        ours = LatentFMPipeline.from_single_file(foreign, pipeline=tiny_folder)
        assert ours.transformer.config.sample_size == 8 and ours.vae.config.norm_num_groups == 4
        assert torch.equal(ours.text_encoder.text_projection.weight, torch.eye(16))  # as SD3's authors and diffusers have it
        second = load_file(foreign)["text_encoders.clip_g.transformer.text_projection.weight"]
        assert torch.equal(ours.text_encoder_2.text_projection.weight, second)
        reference = LatentFMPipeline.from_pretrained(tiny_folder)
        with torch.no_grad():
            reference.text_encoder.text_projection.weight.copy_(torch.eye(16))
        assert_same_picture(reference, ours)

    def test_a_transformer_alone_takes_the_rest_from_the_folder(self, tiny_folder, tmp_path):
        weights = open_weights(tiny_folder, parts=("transformer",))
        write_single(tmp_path / "one.safetensors", weights, "diffusers", None)
        ours = LatentFMPipeline.from_single_file(tmp_path / "one.safetensors", pipeline=tiny_folder)
        assert_same_picture(LatentFMPipeline.from_pretrained(tiny_folder), ours)
        with pytest.raises(InputError, match=r"one.safetensors has no vae; give a pipeline folder"):
            LatentFMPipeline.from_single_file(tmp_path / "one.safetensors")

    def test_without_a_folder_t5_is_left_out_and_clips_tokenizers_are_its_own(self, tmp_path, caplog):
        file = full_vocabulary(tmp_path)
        with caplog.at_level(logging.WARNING):
            pipe = LatentFMPipeline.from_single_file(file)
        assert "T5 is left out: its tokenizer is not in the file" in caplog.text
        assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None
        assert (pipe.tokenizer.pad_token_id, pipe.tokenizer_2.pad_token_id) == (49407, 0)
        assert (pipe.tokenizer.model_max_length, pipe.scheduler.config.shift) == (16, 3.0)
        assert picture(pipe).isfinite().all()

    def test_a_strange_vocabulary_without_tokenizer_is_said(self, single):
        with pytest.raises(InputError, match="text_encoder with a vocabulary of its own and no tokenizer"):
            LatentFMPipeline.from_single_file(single)

    def test_no_encoder_at_all_is_said(self, single, tmp_path, caplog):
        weights = open_weights(single, parts=("transformer", "vae"))
        write_single(tmp_path / "two.safetensors", weights, "original", None)
        with caplog.at_level(logging.WARNING):
            pipe = LatentFMPipeline.from_single_file(tmp_path / "two.safetensors")
        assert "no text encoder: prompts cannot be read" in caplog.text and not pipe.has_encoders

    def test_what_a_pipeline_folder_says_of_itself_rides_along(self, tiny_folder, tmp_path):
        folder = tmp_path / "ours"
        pipe = LatentFMPipeline.from_pretrained(tiny_folder)
        pipe.info = {"max_sequence_length": 9}
        pipe.save_pretrained(folder)
        write_single(tmp_path / "all.safetensors", open_weights(folder), "original", None)
        assert LatentFMPipeline.from_single_file(tmp_path / "all.safetensors", pipeline=tiny_folder).max_sequence_length == 9
        write_single(tmp_path / "net.safetensors", open_weights(folder, parts=("transformer",)), "original", None)
        again = LatentFMPipeline.from_single_file(tmp_path / "net.safetensors", pipeline=folder)
        assert again.max_sequence_length == 9 and again.null.by_length.keys() == {9}


class TestFolders:
    def test_there_and_back_is_bitwise_the_same(self, tiny_folder, single, tmp_path):
        weights = completed(open_weights(single), open_weights(tiny_folder))
        with whole_or_nothing(tmp_path / "back") as partial:
            write_pipeline(partial, weights, None, 10**9)
        for file in tiny_folder.rglob("*.safetensors"):
            found, expected = load_file(tmp_path / "back" / file.relative_to(tiny_folder)), load_file(file)
            assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items()), file
        for file in tiny_folder.rglob("*config.json"):
            found = json.loads((tmp_path / "back" / file.relative_to(tiny_folder)).read_text())
            expected = json.loads(file.read_text())
            assert all(found[name] == value for name, value in expected.items() if not name.startswith("_name")), file

    def test_stock_diffusers_loads_shards_and_draws_the_same(self, tiny_folder, single, tmp_path):
        weights = completed(open_weights(single), open_weights(tiny_folder))
        write_pipeline(tmp_path / "back", weights, None, 60_000)
        assert len(list((tmp_path / "back" / "transformer").glob("*-of-*.safetensors"))) > 2
        pipes = [diffusers.StableDiffusion3Pipeline.from_pretrained(folder) for folder in (tiny_folder, tmp_path / "back")]
        assert_same_picture(*pipes)
        ours = LatentFMPipeline.from_pretrained(tmp_path / "back")
        assert type(ours.transformer) is MMDiT

    def test_metadata_is_kept_but_for_what_no_longer_holds(self, foreign, tiny_folder, tmp_path):
        base = open_weights(tiny_folder)
        write_pipeline(tmp_path / "back", completed(open_weights(foreign, like=base), base), None, 10**9)
        weights = open_weights(tmp_path / "back")
        write_single(tmp_path / "again.safetensors", weights, "original", None)
        for file in (tmp_path / "back/transformer/diffusion_pytorch_model.safetensors", tmp_path / "again.safetensors"):
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            assert metadata["modelspec.title"] == "mine" and metadata["format"] == "pt" and "modelspec.hash_sha256" not in metadata


class TestRefusals:
    def test_missing_and_unknown_tensors_are_named_and_counted(self, foreign, tmp_path):
        def change(tensors):
            for kind in ("weight", "bias"):
                del tensors[f"model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.{kind}"]
            tensors["model.diffusion_model.joint_blocks.0.x_block.surprise.weight"] = torch.zeros(3)

        with pytest.raises(InputError) as refused:
            open_weights(altered(foreign, tmp_path, change))
        said = str(refused.value)
        assert "lacks 2 tensors: transformer_blocks.1.ff.net.0.proj.weight, transformer_blocks.1.ff.net.0.proj.bias" in said
        assert "has 1 tensor too many: joint_blocks.0.x_block.surprise.weight" in said

    def test_another_shape_is_said(self, foreign, tmp_path):
        def change(tensors):
            tensors["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"] = torch.zeros(7, 32)

        with pytest.raises(InputError, match=r"ff.net.0.proj.weight \[7, 32\] where \[128, 32\] is expected"):
            open_weights(altered(foreign, tmp_path, change))

    @pytest.mark.parametrize("name", ["x_embedder.proj.weight", "pos_embed", "context_embedder.weight"])
    def test_a_tensor_that_the_configuration_is_read_from_may_be_the_missing_one(self, foreign, tmp_path, name):
        with pytest.raises(InputError, match="pos_embed|context_embedder|x_embedder|SD3"):
            open_weights(altered(foreign, tmp_path, lambda tensors: tensors.pop(f"model.diffusion_model.{name}")))

    def test_tensors_of_no_part_are_named(self, foreign, tmp_path):
        strange = {"model_ema.decay": torch.ones(1), "text_encoders.bert.w": torch.ones(1)}
        path = altered(foreign, tmp_path, lambda tensors: tensors.update(strange))
        with pytest.raises(InputError, match="2 tensors that belong to no part of an SD3 model: model_ema.decay, text_encoders.bert.w"):
            open_weights(path)

    def test_scaled_float8_is_told(self, foreign, tmp_path):
        scale = {"model.diffusion_model.joint_blocks.0.x.scale_weight": torch.ones(1)}
        path = altered(foreign, tmp_path, lambda tensors: tensors.update(scale))
        with pytest.raises(InputError, match="scaled float8"):
            open_weights(path)

    def test_a_vae_of_other_channels_needs_its_folder(self, foreign):
        with pytest.raises(InputError, match="4 latent channels, SD3's has 16.*pipeline folder"):
            open_weights(foreign)

    def test_damaged_words_of_ours(self, single, tmp_path):
        path = altered(single, tmp_path, lambda _: None, metadata={"latentfm": "{"})
        with pytest.raises(InputError, match="metadata's 'latentfm' cannot be read"):
            open_weights(path)

    def test_paths_that_hold_no_model(self, tmp_path, tiny_folder):
        with pytest.raises(InputError, match="does not exist"):
            open_weights(tmp_path / "nowhere")
        with pytest.raises(InputError, match="no model folder"):
            open_weights(tmp_path)
        (tmp_path / "model.ckpt").write_bytes(b"x")
        with pytest.raises(InputError, match="is a pickle"):
            open_weights(tmp_path / "model.ckpt")
        with pytest.raises(InputError, match="looks like a VAE alone"):
            open_weights(tiny_folder / "vae")
        with pytest.raises(InputError, match="looks like a CLIP alone"):
            open_weights(tiny_folder / "text_encoder" / "model.safetensors")

    def test_folders_that_are_not_complete(self, tmp_path, tiny_folder):
        lacking = {"vae": "lacks the folder vae", "transformer/config.json": "config.json", "vae/config.json": "cannot be read"}
        for lost, says in lacking.items():
            folder = tmp_path / lost.replace("/", "-")
            shutil.copytree(tiny_folder, folder)
            if (folder / lost).is_dir():
                shutil.rmtree(folder / lost)
            else:
                (folder / lost).unlink()
            with pytest.raises(InputError, match=says):
                open_weights(folder)
        folder = tmp_path / "other config"
        shutil.copytree(tiny_folder, folder)
        config = json.loads((folder / "transformer" / "config.json").read_text())
        (folder / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
        with pytest.raises(InputError, match=r"does not fit its config.json: lacks \d+ tensors: transformer_blocks.1.attn.to_add_out"):
            open_weights(folder)


def small(cls, **config) -> list[str]:
    """The names of a small model's tensors."""
    with torch.device("meta"):
        return list(cls(**config).state_dict())


UNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8, "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
HEADS = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
ROPE = {"joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
SD3 = {"joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 8}
REAL = {
    "an SD 1 or SD 2 UNet": lambda: small(diffusers.UNet2DConditionModel, **UNET),
    "an SDXL UNet": lambda: small(diffusers.UNet2DConditionModel, **UNET | XL),
    "a Flux transformer": lambda: small(diffusers.FluxTransformer2DModel, num_single_layers=1, pooled_projection_dim=32, **HEADS, **ROPE),
    "a PixArt transformer": lambda: small(diffusers.PixArtTransformer2DModel, cross_attention_dim=32, caption_channels=8, **HEADS),
    "a DiT of classes": lambda: small(diffusers.DiTTransformer2DModel, num_embeds_ada_norm=10, **HEADS),
    "a Wan video transformer": lambda: small(diffusers.WanTransformer3DModel, text_dim=16, ffn_dim=32, **HEADS),
    "a HunyuanVideo transformer": lambda: small(
        diffusers.HunyuanVideoTransformer3DModel, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 8), **HEADS,
    ),
    "a Qwen-Image transformer": lambda: small(diffusers.QwenImageTransformer2DModel, **HEADS, **ROPE),
    "a ControlNet": lambda: small(diffusers.SD3ControlNetModel, **HEADS, **SD3),
    "a VAE alone": lambda: small(diffusers.AutoencoderKL),
    "a CLIP alone": lambda: small(transformers.CLIPTextModelWithProjection, config=transformers.CLIPTextConfig(**CLIP)),
    "a T5 alone": lambda: small(transformers.T5EncoderModel, config=transformers.T5Config(num_layers=1, d_model=16, d_ff=16, num_heads=2)),
    MMDIT: lambda: small(diffusers.SD3Transformer2DModel, **HEADS, **SD3),
}  # fmt: skip
ORIGINAL = {  # tensors as the released files name them
    "an SD 1 or SD 2 UNet": "model.diffusion_model.input_blocks.0.0.weight model.diffusion_model.middle_block.0.in_layers.0.weight "
    "first_stage_model.encoder.conv_in.weight first_stage_model.decoder.conv_in.weight "
    "cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.weight",
    "an SDXL UNet": "model.diffusion_model.input_blocks.0.0.weight model.diffusion_model.label_emb.0.0.weight "
    "model.diffusion_model.middle_block.0.in_layers.0.weight conditioner.embedders.1.model.transformer.resblocks.0.ln_1.weight",
    "a Flux transformer": "double_blocks.0.img_attn.norm.key_norm.scale single_blocks.0.linear1.weight txt_in.weight",
    "a HunyuanVideo transformer": "double_blocks.0.img_attn_qkv.weight single_blocks.0.linear1.weight txt_in.individual_token_refiner.x",
    "a PixArt transformer": "blocks.0.cross_attn.q_linear.weight t_block.1.weight x_embedder.proj.weight",
    "a DiT of classes": "blocks.0.adaLN_modulation.1.weight y_embedder.embedding_table.weight x_embedder.proj.weight",
    "a Wan video transformer": "patch_embedding.weight blocks.0.cross_attn.k.weight time_projection.1.weight",
    "an AuraFlow transformer": "double_layers.0.attn.w2q.weight cond_seq_linear.weight",
    "a VAE alone": "encoder.down.0.block.0.conv1.weight encoder.conv_in.weight decoder.conv_in.weight",
    "a CLIP alone": "token_embedding.weight transformer.resblocks.0.ln_1.weight positional_embedding",
    LORA: "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
    MMDIT: "joint_blocks.0.context_block.attn.qkv.weight x_embedder.proj.weight",
}


class TestRecognise:
    @pytest.mark.parametrize("kind", REAL)
    def test_models_of_diffusers_and_transformers(self, kind):
        assert recognise(REAL[kind]()) == kind

    @pytest.mark.parametrize("kind", ORIGINAL)
    def test_the_original_namings(self, kind):
        assert recognise(ORIGINAL[kind].split()) == kind

    @pytest.mark.parametrize("kind", [kind for kind in ORIGINAL if kind not in (MMDIT, LORA)])
    def test_a_file_of_another_model_is_refused_by_what_it_looks_like(self, kind, tmp_path):
        save_file({name: torch.zeros(1) for name in ORIGINAL[kind].split()}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=f"looks like {kind}, not an SD3"):
            open_weights(tmp_path / "x.safetensors")

    def test_a_lora_and_the_unknown(self, tmp_path):
        save_file({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="is a LoRA, not a model"):
            load_transformer(tmp_path / "x.safetensors")
        save_file({"weight": torch.zeros(1), "bias": torch.zeros(1)}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="nor anything known here; it begins with bias, weight|weight, bias"):
            load_transformer(tmp_path / "x.safetensors")
