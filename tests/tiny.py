"""A complete stock Stable Diffusion 3 pipeline folder with random weights, small enough to run in a second on a CPU."""

import json
from pathlib import Path

import torch

SENTENCES = [
    "a red apple on a white plate",
    "a photo of a small brown dog in the park",
    "a blue car, flat style",
    "two green trees under a yellow sun",
    "a cat sleeping on an old chair by the window",
    "the moon and seven stars above a dark sea",
    "an orange fish in a glass bowl, noto style",
    "smiling face with purple hat and black shoes",
]
CLIP_WIDTHS = (16, 24)  # hidden and projection widths of the two CLIPs
T5_WIDTH = 48  # the joint width: at least the sum of the CLIPs'
VAE_LEVELS = (8, 16, 16)  # three levels: factor 4


def clip_tokenizer(length: int, pad_token: str):
    """A CLIPTokenizer with a byte-pair vocabulary of SENTENCES; end-of-text is its highest id, as in CLIP."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    pieces = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = pieces.normalizer, pieces.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(SENTENCES, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=length)


def t5_tokenizer(folder: Path):
    """A T5Tokenizer over a sentencepiece unigram model of SENTENCES; writes spiece.model into `folder`."""
    import sentencepiece
    from transformers import T5Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "spiece"), vocab_size=120, model_type="unigram",
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=256)


def clip_text(tokenizer, width: int, act: str):
    """A random CLIPTextModelWithProjection of two layers, `width` wide."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=width, hidden_act=act,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def tiny_pipeline(
    folder: Path, seed: int = 0, with_t5: bool = True, clip_length: int = 16, channels: int = 4, read_channels: int | None = None
) -> Path:
    """Writes a stock StableDiffusion3Pipeline folder of random weights (a function of `seed`) and returns `folder`.

    Images 32 x 32, latents `channels` x 8 x 8 (factor 4), 2 MM-DiT blocks of 2 heads x 16, joint width 48, pooled width 40; an
    inpainting network reads `read_channels`. The velocity network's modulations and output are not zero, so that pictures depend on
    prompts and times. Stock diffusers loads a folder without T5 only when asked with text_encoder_3=None, tokenizer_3=None, as it does
    any SD3 folder.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = [clip_tokenizer(clip_length, "<|endoftext|>"), clip_tokenizer(clip_length, "!")]
        clips = [clip_text(*parts) for parts in zip(tokenizers, CLIP_WIDTHS, ("quick_gelu", "gelu"), strict=True)]
        tokenizer_3, t5 = None, None
        if with_t5:
            tokenizer_3 = t5_tokenizer(folder / "tokenizer_3")
            t5_config = T5Config(
                vocab_size=len(tokenizer_3), d_model=T5_WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
                feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0,
            )  # fmt: skip
            t5 = T5EncoderModel(t5_config).eval()
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=VAE_LEVELS,
            layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=32, scaling_factor=1.5305, shift_factor=0.0609,
            use_quant_conv=False, use_post_quant_conv=False,
        ).eval()  # fmt: skip
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=read_channels or channels, out_channels=channels, num_layers=2,
            attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=T5_WIDTH, caption_projection_dim=32, pooled_projection_dim=sum(CLIP_WIDTHS), pos_embed_max_size=8,
            qk_norm="rms_norm",
        ).eval()  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae,
        text_encoder=clips[0], tokenizer=tokenizers[0], text_encoder_2=clips[1], tokenizer_2=tokenizers[1],
        text_encoder_3=t5, tokenizer_3=tokenizer_3,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def full_vocabulary(place: Path, with_t5: bool = True) -> Path:
    """A foreign single file whose CLIPs are 64 wide and have CLIP's whole vocabulary, and whose VAE has 16 channels as SD3's."""
    import diffusers
    import transformers
    from safetensors.torch import load_file, save_file

    from latentfm.interchange.tensors import read_folder
    from latentfm.interchange.weights import Part, Weights
    from latentfm.interchange.writers import write_single

    torch.manual_seed(0)
    clip = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=16,
        projection_dim=64,
    )  # fmt: skip
    models = {
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=8, num_layers=2, num_attention_heads=1, joint_attention_dim=160, caption_projection_dim=64,
            pooled_projection_dim=128, pos_embed_max_size=8,
        ),
        "vae": diffusers.AutoencoderKL(
            latent_channels=16, block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, use_quant_conv=False, use_post_quant_conv=False,
        ),
        "text_encoder": transformers.CLIPTextModelWithProjection(clip),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(clip),
        "text_encoder_3": transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=50, d_model=160, d_kv=16, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
        ),
    }  # fmt: skip
    parts = {}
    for name, model in models.items():
        if name == "text_encoder_3" and not with_t5:
            continue
        model.save_pretrained(place / name)
        parts[name] = Part(json.loads((place / name / "config.json").read_text()), read_folder(place / name)[0])
    write_single(place / "own.safetensors", Weights(place, "", parts), "original", None)
    save_file(load_file(place / "own.safetensors"), place / "full.safetensors")
    return place / "full.safetensors"


def data_plan(options, folder: Path, lengths=(8,)):
    """What these options of a run's data come to with a pipeline folder's model; prompts of these lengths."""
    from latentfm.planning.model import read_model
    from latentfm.planning.run import plan_data

    return plan_data(options.model_copy(update={"t5_lengths": dict.fromkeys(lengths, 1.0)}), read_model(folder), 1)[1]
