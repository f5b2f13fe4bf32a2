"""The most that may be asked for at once: beyond it a number is a slip of the hand, and obeying it would fill the memory."""

MOST_STEPS = 10_000  # of the sampler; the network tells a thousand times apart
MOST_TOKENS = 8192  # of T5 for a prompt, padding included
MOST_PICTURES = 1_000_000  # in one call of `latentfm generate`
MOST_LETTERS = 1_000_000  # of a prompt; the encoders read a few hundred
MOST_AT_ONCE = 1024  # pictures drawn together, and on one contact sheet
MOST_GUIDANCE = 1000.0
LAST_SEED = 2**63 - 1  # that a generator takes
MOST_TRAINING_STEPS = 99_999_999  # a checkpoint's name has eight digits
MOST_BATCH = 1_000_000  # pictures an optimizer step
