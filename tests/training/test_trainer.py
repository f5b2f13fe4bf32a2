"""The trainer: against Algorithm 5 written out, across stops and processes, and when something goes wrong."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from data.cache.filling import drop, read, whole
from faults import files_no_larger_than
from PIL import Image
from safetensors.torch import load_file

from latentfm.errors import InputError
from latentfm.randomness import generator, permutation, uniform
from latentfm.training.checkpoint import export, storage
from latentfm.training.checkpoint.resuming import differences
from latentfm.training.step import cfm_losses


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def column(out, name):
    return [row[name] for row in rows_of(out)]


def last_state(out):
    tensors, _ = storage.load(storage.checkpoints(out / "checkpoints")[-1])
    return {name: stored.load() for name, stored in tensors.items() if not name.startswith("optimizer.group")}


def network_weights(out):
    return load_file(out / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def same_to_the_bit(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def first_batch(trainer):
    return next(iter(trainer.micro_batches()))


def losses_of(trainer, batch):
    with torch.no_grad():
        return cfm_losses(trainer.models.network, batch, trainer.models.null, trainer.objective)[0]


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A run of seven steps with pictures every three and a checkpoint every two."""
    return run(
        tmp_path_factory.mktemp("finished") / "run", "train.steps=7", "sample.every=3", "output.checkpoint_every=2",
        "sample.prompts=[a red apple, a blue car]",
    )  # fmt: skip


# The step itself


def test_a_run_is_algorithm_5_written_out_with_diffusers_own_models(tmp_path, run, tiny_folder, make_pictures):
    """A plain loop on the same draws: diffusers' network, VAE and prompt encoding, torch's AdamW, nothing of the trainer's."""
    from diffusers import StableDiffusion3Pipeline

    count, batch, steps, length, seed = 5, 3, 20, 8, 11
    data = make_pictures(tmp_path / "pictures", count)
    captions = [path.read_text() for path in sorted(data.glob("*.txt"))]
    out = run(
        tmp_path / "out", f"data.folder={data}", f"train.steps={steps}", f"train.batch_size={batch}", f"train.seed={seed}",
        "train.decay=linear", "data.cache_dtype=float32",
        f"data.t5_lengths={{{length}: 1}}", "train.dropout=0.3", "train.dropout_each=0.3", "train.weight_decay=0.1", "train.ema_decay=0.5",
        "train.t_shift=2", "train.max_grad_norm=0.5", "train.learning_rate=3e-3",
    )  # fmt: skip

    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    network = pipe.transformer.train()
    averages = {name: p.detach().clone() for name, p in network.named_parameters()}
    matrices, vectors = ([p for p in network.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}], betas=(0.9, 0.99))

    def encoded(text):  # [Lc + length, 48], [40]: the two CLIPs share the first rows, T5 has the others
        embeds, _, pooled, _ = pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False, max_sequence_length=length)
        return embeds[0].to(torch.bfloat16).float(), pooled[0].to(torch.bfloat16).float()  # as the cache keeps them

    dropped_something = 0
    for step in range(steps):
        loss = 0.0
        for position in range(step * batch, (step + 1) * batch):
            epoch, place = divmod(position, count)
            index = permutation(count, seed, "order", epoch, 0)[place]
            name = f"{index:02d}.png"
            noise, eps = (torch.randn(4, 8, 8, generator=generator(seed, what, epoch, name)) for what in ("vae_noise", "eps"))
            with torch.no_grad():
                pixels = torch.from_numpy(np.array(Image.open(data / f"{index:02d}.png"))).permute(2, 0, 1) / 127.5 - 1
                posterior = pipe.vae.encode(pixels[None]).latent_dist
                z = (posterior.mean[0] + posterior.std[0] * noise - 0.0609) * 1.5305
                (embeds, pooled), (null, null_pooled) = encoded(captions[index]), encoded("")
            purposes = ("dropout/clip_1", "dropout/clip_2", "dropout/t5")
            joint = uniform(seed, "dropout", epoch, name) < 0.3
            drop = [joint or uniform(seed, purpose, epoch, name) < 0.3 for purpose in purposes]
            dropped_something += any(drop)
            for drop_it, rows, columns, part in zip(
                drop, (slice(16), slice(16), slice(16, None)), (slice(16), slice(16, 40), slice(None)), (slice(16), slice(16, 40), None)
            ):
                if drop_it:
                    embeds[rows, columns] = null[rows, columns]
                    if part is not None:
                        pooled[part] = null_pooled[part]
            sigma = torch.sigmoid(torch.special.ndtri(torch.tensor(uniform(seed, "t", epoch, name))))
            t = 1 - 2 * sigma / (1 + sigma)
            x_t = t * z + (1 - t) * eps
            answer = network(x_t[None], embeds[None], pooled[None], 1000 * (1 - t)[None]).sample[0]
            loss = loss + (-answer - (z - eps)).square().mean() / batch
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * ((step + 1) / 2 if step < 2 else 1 - (step - 2) / (steps - 2))
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in network.named_parameters():
            averages[name].lerp_(parameter.detach(), 1 - min(0.5, (2 + step) / (11 + step)))
        row = rows_of(out)[step]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
        assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert row["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert dropped_something and norm > 0.5  # both branches were taken
    weights = network_weights(out)
    for name, value in averages.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5)


def test_dropped_rows_read_the_null_condition_and_only_those(tmp_path, start):
    trainer = start(tmp_path / "out", "train.batch_size=10", "train.dropout=0.0")
    batch = first_batch(trainer)
    null = trainer.models.null.parts(batch.t5_length)
    plain = losses_of(trainer, batch)
    for name, mine in (("clip_1", ("clip_1", "pooled_1")), ("clip_2", ("clip_2", "pooled_2")), ("t5", ("t5",))):
        mask = torch.arange(10) % 3 == 0
        dropped = losses_of(trainer, replace(batch, dropped=batch.dropped | {name: mask}))
        swapped = {part: getattr(batch.parts, part).clone() for part in mine}
        for part in mine:
            swapped[part][mask] = getattr(null, part).to(swapped[part].dtype)
        torch.testing.assert_close(dropped, losses_of(trainer, replace(batch, parts=replace(batch.parts, **swapped))), rtol=1e-6, atol=0)
        torch.testing.assert_close(dropped[~mask], plain[~mask], rtol=1e-6, atol=0)
        assert (dropped[mask] - plain[mask]).abs().min() > 1e-6
    encoded = trainer.models.encoder.encode([""], batch.t5_length)  # the null condition of a stock folder is the empty prompt
    assert all(torch.equal(getattr(null, part), value) for part, value in encoded.items())


@pytest.mark.parametrize("dropout", ["train.dropout=1", "train.dropout_each=1"])
def test_with_every_condition_dropped_captions_do_not_matter(tmp_path, run, make_pictures, dropout):
    other = make_pictures(tmp_path / "other", opening="night ")
    first = run(tmp_path / "first", "train.steps=2", dropout)
    second = run(tmp_path / "second", "train.steps=2", dropout, f"data.folder={other}")
    assert column(first, "loss") == column(second, "loss")
    third = run(tmp_path / "third", "train.steps=2", "train.dropout=0", f"data.folder={other}")
    fourth = run(tmp_path / "fourth", "train.steps=2", "train.dropout=0")
    assert column(third, "loss") != column(fourth, "loss")


# Stops, processes, and ways to compute the same


def killed_at(step, arguments, environment, signal_name="SIGKILL", place="log"):
    """Runs the command line in a process that kills itself once the row of `step` is written."""
    program = (
        "import os, signal, sys\n"
        "from latentfm.training.trainer import Trainer\n"
        "log = Trainer.log\n"
        "def log_then_die(self, row):\n"
        "    log(self, row)\n"
        f"    if self.step == {step}: os.kill(os.getpid(), signal.{signal_name})\n"
        "Trainer.log = log_then_die\n"
        "from latentfm.cli.main import main\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "train", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


BF16 = ["train.weights=bfloat16", "train.token_routing={keep: 0.5, first: 0, last: 0}"]


@pytest.mark.parametrize("how", [[], BF16], ids=["float32", "bfloat16 weights and routed tokens"])
def test_a_killed_run_goes_on_to_the_bit(tmp_path, run, options, environment, how):
    more = ["train.steps=11", "output.checkpoint_every=3", "train.dropout=0.2", "data.flip=true", "sample.every=5", *how]
    whole = run(tmp_path / "whole", *more)
    cut = tmp_path / "cut"
    died = killed_at(8, options(cut, *more, "data.workers=1"), environment)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert column(cut, "step") == list(range(1, 9))
    assert [p.name for p in storage.checkpoints(cut / "checkpoints")] == ["step-00000003", "step-00000006"]
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a row cut by the kill
    assert run(cut, *more, resume=True) == cut
    assert column(cut, "step") == list(range(1, 12))
    assert column(cut, "loss") == column(whole, "loss")
    assert column(cut, "gradient_norm") == column(whole, "gradient_norm")
    assert column(cut, "learning_rate") == column(whole, "learning_rate")
    assert same_to_the_bit(last_state(cut), last_state(whole))  # weights, averages and the optimizer's moments
    assert same_to_the_bit(network_weights(cut), network_weights(whole))
    pictures = sorted(p.name for p in (whole / "samples").glob("step-*.png"))
    assert pictures == [f"step-{step:08d}.png" for step in (0, 5, 10, 11)]
    for name in pictures:
        assert (cut / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()


def test_two_stops_are_no_worse_than_one(tmp_path, run, options, environment):
    more = ["train.steps=5", "output.checkpoint_every=1"]
    whole = run(tmp_path / "whole", *more)
    cut = tmp_path / "cut"
    for step in (2, 4):
        arguments = options(cut, *more) + (["--resume"] if cut.exists() else [])
        assert killed_at(step, arguments, environment).returncode == -signal.SIGKILL
    run(cut, *more, resume=True)
    assert column(cut, "step") == [1, 2, 3, 4, 5] and column(cut, "loss") == column(whole, "loss")
    assert same_to_the_bit(last_state(cut), last_state(whole))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_in_the_middle_of_an_update_saves_a_whole_step(tmp_path, run, start, monkeypatch, moment):
    """A Ctrl-C while the optimizer writes: what is saved must not hold new weights under the old step, or old averages."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
    whole = run(tmp_path / "whole", "train.steps=5")
    trainer = start(tmp_path / "cut", "train.steps=5")
    step = trainer.weights.optimizer.step

    def press(*arguments):
        if trainer.step == 2 and moment == "before":
            signal.raise_signal(signal.SIGINT)
        step(*arguments)
        if trainer.step == 2 and moment == "after":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.weights.optimizer, "step", press)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [p.name for p in storage.checkpoints(tmp_path / "cut" / "checkpoints")] == ["step-00000003"]
    run(tmp_path / "cut", "train.steps=5", resume=True)
    assert same_to_the_bit(last_state(tmp_path / "cut"), last_state(whole))
    assert column(tmp_path / "cut", "loss") == column(whole, "loss")


def test_ctrl_c_twice_stops_at_once(tmp_path, start, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = start(tmp_path / "out")

    def pressed_twice(batches):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "train_step", pressed_twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert storage.checkpoints(tmp_path / "out" / "checkpoints") == []


@pytest.mark.parametrize("other", ["train.gradient_accumulation=4", "train.gradient_checkpointing=true", "data.workers=2"])
def test_other_ways_to_compute_the_same(tmp_path, run, other):
    plain, changed = run(tmp_path / "plain", "train.batch_size=8"), run(tmp_path / "changed", "train.batch_size=8", other)
    assert column(changed, "loss") == pytest.approx(column(plain, "loss"), rel=0, abs=1e-5)
    assert column(changed, "gradient_norm") == pytest.approx(column(plain, "gradient_norm"), rel=1e-4)


def test_accumulation_and_checkpointing_really_happen(tmp_path, start, monkeypatch):
    trainer = start(tmp_path / "out", "train.batch_size=8", "train.gradient_accumulation=4", "train.gradient_checkpointing=true")
    batch = first_batch(trainer)
    assert batch.moments.shape[0] == 2
    calls = []
    block = trainer.models.network.transformer_blocks[0]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    cfm_losses(trainer.models.network, batch, trainer.models.null, trainer.objective)[0].mean().backward()
    assert len(calls) == 2  # once forward, once again in the backward pass


@pytest.mark.parametrize("share, runs", [("false", [1, 1]), ("0.5", [1, 2]), ("true", [2, 2])])
def test_a_share_of_the_blocks_is_computed_again(tmp_path, start, monkeypatch, share, runs):
    trainer = start(tmp_path / "out", f"train.gradient_checkpointing={share}")
    batch = first_batch(trainer)
    calls = [0, 0]
    for index, block in enumerate(trainer.models.network.transformer_blocks):

        def counted(*arguments, index=index, forward=block.forward):
            calls[index] += 1
            return forward(*arguments)

        monkeypatch.setattr(block, "forward", counted)
    cfm_losses(trainer.models.network, batch, trainer.models.null, trainer.objective)[0].mean().backward()
    assert calls == runs


def test_bf16_is_close_to_float32_and_keeps_float32_weights(tmp_path, run):
    exact, half = run(tmp_path / "exact", "train.steps=3"), run(tmp_path / "half", "train.steps=3", "train.mixed_precision=bf16")
    assert column(half, "loss") != column(exact, "loss")
    assert column(half, "loss") == pytest.approx(column(exact, "loss"), rel=0.02)
    assert {value.dtype for value in last_state(half).values()} == {torch.float32}


# bfloat16 weights


@pytest.mark.parametrize(
    "how, extra",
    [
        ([], {}), (["train.master_weights=true"], {"master": torch.float32}),
        (["train.moments=bfloat16"], {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}),
    ],
    ids=["stochastic rounding", "master weights", "bfloat16 moments"],
)  # fmt: skip
def test_bfloat16_weights_train_like_float32(tmp_path, run, how, extra):
    more = ["train.steps=30", "train.learning_rate=3e-3", "train.decay=constant", "train.batch_size=10", "train.ema_decay=0.5"]
    exact, half = run(tmp_path / "exact", *more), run(tmp_path / "half", *more, "train.weights=bfloat16", *how)
    assert column(half, "loss") == pytest.approx(column(exact, "loss"), rel=0.05)
    assert np.mean(column(half, "loss")) == pytest.approx(np.mean(column(exact, "loss")), rel=0.01)
    assert column(half, "gradient_norm") == pytest.approx(column(exact, "gradient_norm"), rel=0.3)
    state = last_state(half)
    kinds = {name.removeprefix("optimizer.").partition("/")[0] for name in state if name.startswith("optimizer.")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"} | extra.keys()
    moments = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "step": torch.int64} | extra
    for name, value in state.items():
        if name.startswith("optimizer."):
            assert value.dtype == moments[name.removeprefix("optimizer.").partition("/")[0]]
        else:
            assert value.dtype == (torch.float32 if name.startswith("ema.") else torch.bfloat16)
    saved = network_weights(half)  # in float32: the averages as they are, not what bfloat16 holds of them
    assert saved.keys() - {"pos_embed.pos_embed"} == {name.removeprefix("ema.") for name in state if name.startswith("ema.")}
    for name, value in saved.items():
        assert value.dtype == torch.float32 and (name == "pos_embed.pos_embed" or torch.equal(value, state[f"ema.{name}"]))
    assert not torch.equal(saved["proj_out.weight"], saved["proj_out.weight"].to(torch.bfloat16).float())


def test_with_masters_the_averages_follow_them_and_begin_in_float32(tmp_path, run, start, tiny_folder):
    more = ["train.weights=bfloat16", "train.master_weights=true", "train.ema_decay=0"]
    base = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    trainer = start(tmp_path / "first", *more)
    assert {p.dtype for p in trainer.models.network.parameters()} == {torch.bfloat16}
    for parameter in trainer.models.network.parameters():
        name = trainer.weights.shards.names[id(parameter)]
        assert torch.equal(trainer.weights.ema.shadow[name], base[name]) and torch.equal(parameter, base[name].to(torch.bfloat16))
        assert torch.equal(trainer.weights.optimizer.state[parameter]["master"], base[name])
    state = last_state(run(tmp_path / "run", *more, "train.steps=3"))
    for name, value in state.items():
        if name.startswith("ema."):
            master = state[f"optimizer.master/{name.removeprefix('ema.')}"]
            assert torch.equal(value, master) and torch.equal(state[f"model.{name.removeprefix('ema.')}"], master.to(torch.bfloat16))


def test_with_bfloat16_weights_mixed_precision_makes_no_difference(tmp_path, run):
    first, second = (run(tmp_path / word, "train.steps=2", f"train.mixed_precision={word}", *BF16) for word in ("no", "bf16"))
    assert column(first, "loss") == column(second, "loss") and same_to_the_bit(last_state(first), last_state(second))


# Routed tokens, and who computes attention


def test_all_tokens_kept_is_no_routing_and_fewer_are_another_training(tmp_path, run):
    plain = run(tmp_path / "plain")
    full = run(tmp_path / "full", "train.token_routing={keep: 1.0, first: 0, last: 1}")
    assert column(full, "loss") == column(plain, "loss") and same_to_the_bit(last_state(full), last_state(plain))
    half = run(tmp_path / "half", "train.token_routing={keep: 0.5, first: 0, last: -1}")
    assert all(a != b for a, b in zip(column(half, "loss"), column(plain, "loss"), strict=True))
    first, second = ((out / "samples" / "step-00000000.png").read_bytes() for out in (half, plain))
    assert first == second  # pictures are drawn with all tokens


def test_the_routed_blocks_see_the_kept_tokens_of_each_sample(tmp_path, start, monkeypatch):
    trainer = start(tmp_path / "out", "train.token_routing={keep: 0.25, first: -1, last: -1}")
    batch = first_batch(trainer)
    assert batch.kept.shape == (4, 4)
    seen = []
    for block in trainer.models.network.transformer_blocks:
        monkeypatch.setattr(block, "forward", lambda *a, forward=block.forward: seen.append(a[0].clone()) or forward(*a))
    losses = losses_of(trainer, batch)
    assert [image.shape[1] for image in seen] == [16, 4]
    assert not torch.equal(losses_of(trainer, replace(batch, kept=torch.arange(4).expand(4, 4))), losses)
    seen.clear()
    assert losses_of(trainer, replace(batch, kept=None)).shape == (4,) and [image.shape[1] for image in seen] == [16, 16]


@pytest.mark.parametrize(
    "routing, message",
    [
        ("{}", "from block 2 to -3 does not fit this network of 2 blocks; choose 0 <= first <= last <= 1"),
        ("{first: 1, last: 0}", "from block 1 to 0 does not fit"), ("{first: -3, last: 1}", "from block -3 to 1 does not fit"),
        ("{keep: 0.01, first: 0, last: 0}", "keep 0.01 of a picture's 16 image tokens is 0 of them; choose a keep from 1/16 to 15/16"),
        ("{keep: 0.99, first: 0, last: 0}", "keep 0.99 of a picture's 16 image tokens is 16 of them"),
    ],
)  # fmt: skip
def test_a_routing_that_does_not_fit_is_refused_before_any_work(tmp_path, start, routing, message):
    with pytest.raises(InputError, match=re.escape(message)):
        start(tmp_path / "out", f"train.token_routing={routing}", f"data.cache={tmp_path / 'cache'}")
    assert list(tmp_path.iterdir()) == []


def test_an_attention_backend_is_taken_or_refused_before_any_work(tmp_path, run, start):
    plain, math_ = run(tmp_path / "plain", "train.steps=2"), run(tmp_path / "math", "train.steps=2", "train.attention=math")
    assert column(math_, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
    with pytest.raises(InputError, match="no attention backend 'flsh'.*did you mean 'flash'"):
        start(tmp_path / "out", "train.attention=flsh")
    with pytest.raises(InputError, match="flex.* cannot compute .*backward on CPU.*Use 'auto'"):
        start(tmp_path / "out", "train.attention=flex", f"data.cache={tmp_path / 'cache'}")
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_an_attention_without_a_gradient_is_refused(tmp_path, start, monkeypatch):
    from latentfm.models import backends

    monkeypatch.setattr(backends, "attend", lambda query, key, value, backend: query.detach())  # as quantised kernels do
    with pytest.raises(InputError, match="'auto' has no gradient"):
        start(tmp_path / "out")


def test_a_checkpoint_from_before_an_option_existed_had_its_default():
    now = {"train": {"weights": "float32", "steps": 7}, "output": {"keep": 1}}
    assert differences({"train": {"steps": 7}}, now) == []
    assert differences({"train": {"steps": 7}}, {"train": now["train"] | {"weights": "bfloat16"}}) == [
        "train.weights was 'float32', is 'bfloat16'"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, close", [([], 1e-5), (["train.gradient_checkpointing=0.5"], 1e-5), (["train.weights=bfloat16"], 0.02), (BF16[1:], 1e-5)]
)  # fmt: skip
def test_compiled_blocks_train_the_same(tmp_path, run, how, close):
    plain = run(tmp_path / "plain", *how)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(tmp_path / "compiled", "train.compile=true", *how)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2  # each of the blocks, at each of the two lengths
    assert column(compiled, "loss") == pytest.approx(column(plain, "loss"), rel=0, abs=close)
    assert network_weights(compiled).keys() == network_weights(plain).keys()


def test_training_learns(tmp_path, run):
    out = run(tmp_path / "out", "train.steps=60", "train.learning_rate=3e-3", "train.decay=constant", "train.batch_size=10")
    losses = column(out, "loss")
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])


# What a run leaves behind


def test_the_result_is_a_stock_pipeline_of_the_averaged_weights(finished, tiny_folder):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from latentfm import LatentFMPipeline

    folder = finished / "model"
    state = last_state(finished)
    averages = {name.removeprefix("ema."): value for name, value in state.items() if name.startswith("ema.")}
    online = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    saved = network_weights(finished)
    assert saved.keys() == averages.keys() | {"pos_embed.pos_embed"}
    assert all(torch.equal(saved[name], value) for name, value in averages.items())
    assert not torch.equal(averages["proj_out.weight"], online["proj_out.weight"])

    assert {p.suffix for p in folder.rglob("*")} & {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"} == set()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    classes = [value for key, value in index.items() if not key.startswith("_") and value[0] is not None]
    assert {library for library, _ in classes} == {"diffusers", "transformers"}
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert json.loads((folder / "transformer" / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):  # the frozen models are the base's
        for path in (folder / name).glob("*.safetensors"):
            assert path.read_bytes() == (tiny_folder / name / path.name).read_bytes()

    stock, ours = StableDiffusion3Pipeline.from_pretrained(folder), LatentFMPipeline.from_pretrained(folder)
    assert type(stock.transformer) is SD3Transformer2DModel
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "max_sequence_length": 12, "output_type": "pt"}
    first = stock("a red apple", latents=latents.clone(), **settings).images
    torch.testing.assert_close(ours("a red apple", latents=latents, **settings).images, first, rtol=0, atol=1e-4)
    assert {8, 12} <= set(ours.null.by_length)
    assert ours.info["trained"] == {"steps": 7, "batch_size": 4, "seed": 0, "t5_lengths": [8, 12]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_result_is_saved_in_the_asked_precision(tmp_path, run, dtype):
    out = run(tmp_path / "out", "train.steps=1", f"output.dtype={dtype}")
    saved, state = network_weights(out), last_state(out)
    assert {value.dtype for value in saved.values()} == {getattr(torch, dtype)}
    assert torch.equal(saved["proj_out.weight"], state["ema.proj_out.weight"].to(getattr(torch, dtype)))
    assert state["ema.proj_out.weight"].dtype == torch.float32


def test_pictures_rows_and_checkpoints_come_when_they_should(finished):
    assert sorted(p.name for p in (finished / "samples").glob("step-*")) == [f"step-{step:08d}.png" for step in (0, 3, 6, 7)]
    with Image.open(finished / "samples" / "step-00000000.png") as first, Image.open(finished / "samples" / "step-00000007.png") as last:
        assert first.size == last.size and first.size[0] >= 64  # two pictures of 32
        assert first.tobytes() != last.tobytes()
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]
    rows = rows_of(finished)
    assert [row["step"] for row in rows] == list(range(1, 8))
    for row in rows:
        numbers = {"step", "loss", "learning_rate", "gradient_norm", "images_per_second", "seconds", "memory_gib"}
        assert row.keys() == numbers | {"loss_by_t", "count_by_t"}
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in numbers)
        assert sum(row["count_by_t"]) == 4 and len(row["loss_by_t"]) == 8
        assert [value is None for value in row["loss_by_t"]] == [count == 0 for count in row["count_by_t"]]
        by_t = sum(value * count for value, count in zip(row["loss_by_t"], row["count_by_t"], strict=True) if count)
        assert by_t / 4 == pytest.approx(row["loss"], rel=1e-5)
    config = json.loads((finished / "config.json").read_text())
    assert config["train"]["steps"] == 7 and config["data"]["t5_lengths"] == {"8": 0.5, "12": 0.5}
    assert list(finished.rglob("*.partial")) == []


def test_tensorboard_reads_the_same_losses(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (finished / "logs").rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events)).Reload()
    for name in ("loss", "learning_rate", "gradient_norm"):
        scalars = reader.Scalars(name)
        assert [scalar.step for scalar in scalars] == list(range(1, 8))
        assert [scalar.value for scalar in scalars] == pytest.approx(column(finished, name), rel=1e-6)


def test_pictures_while_training_leave_no_trace_in_it(tmp_path, run):
    often, never = run(tmp_path / "often", "sample.every=1", "train.steps=4"), run(tmp_path / "never", "train.steps=4")
    assert column(often, "loss") == column(never, "loss")
    assert same_to_the_bit(last_state(often), last_state(never))


# When something is wrong


def test_a_sample_that_is_not_finite_stops_the_run_by_name_and_touches_nothing(tmp_path, run, start):
    more = ["train.batch_size=2", "train.steps=5", "output.checkpoint_every=1", "train.dropout=0"]
    clean = run(tmp_path / "clean", *more, f"data.cache={tmp_path / 'cache'}", "train.steps=2", "train.decay=constant")
    trainer = start(tmp_path / "unused", *more, f"data.cache={tmp_path / 'cache'}", "train.decay=constant")
    order = permutation(10, 0, "order", 0, 0)
    sample = trainer.data.samples[order[5]]  # the second of the third step
    key = trainer.data.image_key(sample, False)
    moments = read(trainer.data.cache, key)["moments"]
    moments[0, 3, 3] = float("nan")
    drop(trainer.data.cache, key)
    trainer.data.cache.write("moments", {key: {"moments": moments}})
    with pytest.raises(InputError, match=rf"not finite at step 3 for {re.escape(sample.id)};.*untouched"):
        run(tmp_path / "out", *more, f"data.cache={tmp_path / 'cache'}", "train.decay=constant")
    assert column(tmp_path / "out", "step") == [1, 2]
    assert column(tmp_path / "out", "loss") == column(clean, "loss")
    assert same_to_the_bit(last_state(tmp_path / "out"), last_state(clean))
    assert not (tmp_path / "out" / "model").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, start, monkeypatch):
    trainer = start(tmp_path / "out", "output.checkpoint_every=1")
    backward = trainer.accelerator.backward

    def overflow(loss):
        backward(loss)
        if trainer.step == 1:
            trainer.models.network.proj_out.weight.grad[0, 0] = float("inf")

    monkeypatch.setattr(trainer.accelerator, "backward", overflow)
    with pytest.raises(InputError, match="gradient is not finite at step 2"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in last_state(tmp_path / "out").values())
    assert column(tmp_path / "out", "step") == [1]


def test_a_disk_that_fills_while_exporting_leaves_the_earlier_result(tmp_path, finished, start, tiny_folder):
    target = tmp_path / "model"
    shutil.copytree(finished / "model", target)
    before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
    trainer = start(tmp_path / "run")
    size = (finished / "model" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    arguments = (target, trainer.models, trainer.models.network, {}, trainer.config, [8])
    with files_no_larger_than(size // 2), pytest.raises(InputError, match=f"could not write {re.escape(str(target))}"):
        export.write_pipeline(*arguments)
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_a_finished_run_is_not_overwritten(finished, start, run, tmp_path):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="already holds a run.*--resume"):
        start(finished)
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    only_model, only_checkpoint = tmp_path / "model", tmp_path / "checkpoint"
    (only_model / "model").mkdir(parents=True)
    shutil.copytree(finished / "checkpoints", only_checkpoint / "checkpoints")
    for out in (only_model, only_checkpoint):
        with pytest.raises(InputError, match="already holds a run"):
            start(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        start(tmp_path / "file")


def test_a_finished_run_has_nothing_to_resume_and_stays_as_it_is(finished, run, options, capsys):
    from latentfm.config import load_config
    from latentfm.training.trainer import train

    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert train(load_config(None, options(finished)), resume=True) == finished / "model"
    assert "is finished already" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_there_must_be_something_to_resume(tmp_path, start):
    with pytest.raises(InputError, match="nothing to resume"):
        start(tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()


def test_a_finished_run_resumed_has_nothing_left_to_do(tmp_path, finished, run):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    more = ["train.steps=7", "sample.every=3", "output.checkpoint_every=2", "sample.prompts=[a red apple, a blue car]"]
    run(out, *more, resume=True)
    assert rows_of(out) == rows_of(finished)
    assert same_to_the_bit(network_weights(out), network_weights(finished))


@pytest.mark.parametrize(
    "change, message",
    [
        ("train.learning_rate=2e-3", r"train\.learning_rate was 0\.001, is 0\.002"),
        ("train.steps=9", r"train\.steps was 7, is 9"),
        ("data.flip=true", r"data\.flip was False, is True"),
        ("data.t5_lengths={8: 0.5, 12: 0.6}", r"data\.t5_lengths was .*0\.5.*is .*0\.6"),
    ],
)
def test_a_changed_option_is_named_on_resume(tmp_path, finished, start, change, message):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    with pytest.raises(InputError, match=message):
        start(out, "train.steps=7", change, resume=True)


def test_options_that_do_not_touch_the_training_may_change_on_resume(tmp_path, finished, start, cache_folder):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    shutil.copytree(cache_folder, tmp_path / "cache")
    trainer = start(
        out, "train.steps=7", "data.workers=1", "output.keep=5", "sample.prompts=[a cat]", "train.gradient_checkpointing=true",
        "train.gradient_accumulation=2", f"data.cache={tmp_path / 'cache'}", resume=True,
    )  # fmt: skip
    assert trainer.step == 7


def added_picture(folder):
    shutil.copy(folder / "00.png", folder / "10.png")
    shutil.copy(folder / "00.txt", folder / "10.txt")


@pytest.mark.parametrize(
    "change, message",
    [
        (added_picture, "pictures, captions of this run"),
        (lambda folder: (folder / "00.png").unlink(), "pictures, captions of this run"),
        (lambda folder: shutil.copy(folder / "01.png", folder / "00.png"), "pictures of this run"),
        (lambda folder: (folder / "00.txt").write_text("another caption"), "captions of this run"),
    ],
    ids=["one more", "one less", "other pixels", "other words"],
)
def test_a_changed_dataset_is_refused_on_resume(tmp_path, finished, start, pictures, change, message):
    out, data = tmp_path / "again", tmp_path / "pictures"
    shutil.copytree(finished, out)
    shutil.copytree(pictures, data)
    start(out, "train.steps=7", f"data.folder={data}", resume=True)
    change(data)
    with pytest.raises(InputError, match=message):
        start(out, "train.steps=7", f"data.folder={data}", resume=True)


def test_a_batch_must_divide_by_processes_and_accumulation(tmp_path, start, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="batch_size 4 does not divide by 3 processes"):
        start(tmp_path / "out")


def test_unreadable_pictures_are_left_out_by_name(tmp_path, run, pictures, capsys):
    data = tmp_path / "pictures"
    shutil.copytree(pictures, data)
    (data / "03.png").write_bytes((data / "03.png").read_bytes()[:100])
    out = run(tmp_path / "out", f"data.folder={data}", "train.steps=3")
    said = capsys.readouterr().out
    assert all(part in said for part in ("03.png", "1 of 10 pictures cannot be read", "9 pictures in 1 bucket, 3 steps"))
    assert len(rows_of(out)) == 3
    for path in data.glob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of the 10 pictures"):
        run(tmp_path / "none", f"data.folder={data}")


# Sizes, flips, and training from nothing


def test_a_picture_of_another_shape_trains_at_the_asked_size(tmp_path, start, run, make_pictures):
    data = make_pictures(tmp_path / "pictures", size=(50, 37))
    out = run(tmp_path / "out", f"data.folder={data}", "data.size=[48, 24]", "train.steps=2")
    with Image.open(out / "samples" / "step-00000002.png") as picture:
        assert picture.size[0] >= 48 and picture.size[0] > picture.size[1]
    trainer = start(tmp_path / "other", f"data.folder={data}", "data.size=[48, 24]")
    assert first_batch(trainer).moments.shape == (4, 8, 6, 12)  # [B, 2 C, height / 4, width / 4]


@pytest.mark.parametrize(
    "size, message",
    [
        ("30", "data.size 30 is not a multiple of 8; the nearest are 24 and 32"), ("[32, 20]", "data.size 20 .* 16 and 24"),
        ("4", "nearest are 8 and 16"), ("0", "data.size 0 .* 8 and 16"), ("72", "data.size 72 is larger than this network's 64"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_fit_is_refused(tmp_path, start, size, message):
    with pytest.raises(InputError, match=message):
        start(tmp_path / "out", f"data.size={size}")


def test_flips_cache_both_orientations_and_use_both(tmp_path, start):
    trainer = start(tmp_path / "out", "data.flip=true", "train.batch_size=10", f"data.cache={tmp_path / 'cache'}")
    first_batch(trainer)
    data = trainer.data
    with_flip = {key for sample in data.samples for flip in (False, True) if (key := data.image_key(sample, flip))}
    assert len(with_flip) == 20 and all(whole(data.cache, key) for key in with_flip)
    seen = set()
    for batch in trainer.micro_batches():
        for name, moments in zip(batch.ids, batch.moments):
            sample = next(s for s in data.samples if s.id == name)
            (flip,) = (f for f in (False, True) if torch.equal(moments, read(data.cache, data.image_key(sample, f))["moments"]))
            seen.add((name, flip))
    assert len(seen) > 13 and {flip for _, flip in seen} == {False, True}  # 60 draws of 20


def test_a_new_network_of_a_preset_trains_and_its_result_loads(tmp_path, run, monkeypatch):
    from diffusers import StableDiffusion3Pipeline

    from latentfm.models import presets

    small = presets.size(2, 1, sample_size=8, pos_embed_max_size=8)
    monkeypatch.setitem(presets.PRESETS, "atom", small)
    out = run(tmp_path / "out", "model.preset=atom", "train.steps=3", "train.learning_rate=1e-2")
    first = rows_of(out)[0]["loss"]
    assert 0.5 < first < 10  # the untrained output is 0: the loss is the mean square of z - eps
    pipe = StableDiffusion3Pipeline.from_pretrained(out / "model")
    assert (pipe.transformer.config.num_layers, pipe.transformer.config.in_channels) == (2, 4)
    image = pipe("a red apple", num_inference_steps=1, max_sequence_length=12, output_type="np").images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()
    again = run(tmp_path / "again", "model.preset=atom", "train.steps=3", "train.learning_rate=1e-2")
    assert column(again, "loss") == column(out, "loss")
    other = run(tmp_path / "other", "model.preset=atom", "train.steps=3", "train.learning_rate=1e-2", "train.seed=1")
    assert column(other, "loss") != column(out, "loss")


def test_a_model_without_t5_trains_and_its_zeros_are_as_wide_as_each_network_needs(tmp_path, run, monkeypatch):
    from tiny import tiny_pipeline

    from latentfm.models import presets

    monkeypatch.setitem(presets.PRESETS, "wide", presets.size(1, 1, sample_size=8, pos_embed_max_size=8, joint_attention_dim=64))
    base = tiny_pipeline(tmp_path / "base", with_t5=False)
    more = [f"model.pipeline={base}", f"data.cache={tmp_path / 'cache'}", "train.steps=2"]
    run(tmp_path / "narrow", *more)  # joint width 48
    run(tmp_path / "wide", *more, "model.preset=wide")  # joint width 64, the same captions and cache
    assert len(rows_of(tmp_path / "wide")) == 2
