"""How much at once: the most that may be asked for, and what is worked on together, which planning counts with. Needs no torch."""

# Beyond these a number is a slip of the hand, and obeying it would fill the memory
MOST_STEPS = 10_000  # of the sampler; the network tells a thousand times apart
MOST_TOKENS = 8192  # of T5 for a prompt, padding included
MOST_SIDE = 8192  # of latents: pictures of 65,536 pixels a side
MOST_PICTURES = 1_000_000  # in one call of `latentfm generate`
MOST_LETTERS = 1_000_000  # of a prompt; the encoders read a few hundred
MOST_AT_ONCE = 1024  # pictures drawn together, and on one contact sheet
MOST_GUIDANCE = 1000.0
MOST_LORA = 10.0  # strength of a LoRA, either way
LAST_SEED = 2**63 - 1  # that a generator takes
MOST_TRAINING_STEPS = 99_999_999  # a checkpoint's name has eight digits
MOST_BATCH = 1_000_000  # pictures an optimizer step

IMAGES_AT_ONCE, CAPTIONS_AT_ONCE = 8, 32  # that are encoded together for a cache, at least
MOST_IMAGES_AT_ONCE, MOST_CAPTIONS_AT_ONCE = 128, 256  # on a GPU, which a few small ones leave waiting for their kernels' launches
LARGE = 512**2  # pixels: pictures beyond it are encoded one by one
DEFAULT_PROMPTS = 8  # that are drawn while training where the options have none
OPTIMIZER_CHUNK = 1 << 23  # numbers whose float32 copies a step makes together, of AdamW on a GPU, of Muon anywhere
EMA_CHUNK = 1 << 24  # and the averages
SHORT_ATTENTION = 256  # keys, up to which a CPU trains sooner in float32 than in bfloat16: in four tenths of the time at 56, eight at 200


def images_at_once(pixels: int, cpu: bool) -> int:
    """How many pictures of a size are encoded together: on a GPU the more the smaller they are, in no more memory than those of LARGE."""
    return IMAGES_AT_ONCE if cpu else fitting(IMAGES_AT_ONCE, IMAGES_AT_ONCE * LARGE // pixels, MOST_IMAGES_AT_ONCE)


def captions_at_once(length: int, cpu: bool) -> int:
    """How many captions of a T5 length are encoded together: on a GPU the more the shorter they are."""
    return CAPTIONS_AT_ONCE if cpu else fitting(CAPTIONS_AT_ONCE, CAPTIONS_AT_ONCE * MOST_CAPTIONS_AT_ONCE // length, MOST_CAPTIONS_AT_ONCE)


def fitting(least: int, number: int, most: int) -> int:
    """The power of two at or below `number`, within bounds that are powers of two themselves."""
    return 1 << max(least, min(number, most)).bit_length() - 1
