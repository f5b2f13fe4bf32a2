"""Training from several sources: masks, a regularisation set, repeats and weights, and what a resumed run notices."""

import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data.cache.filling import read
from PIL import Image

from latentfm import flow
from latentfm.data.images import Transform, UnreadableImage, load_mask
from latentfm.data.mixture import Mixture
from latentfm.errors import InputError
from latentfm.training.checkpoint import storage
from latentfm.training.step import cfm_losses


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def half_white(size=(32, 32)):
    """White on the left half."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[:, : size[0] // 2] = 255
    return Image.fromarray(pixels)


def write_parquet(folder, path, masks=False, count=5):
    """The first pictures of `folder` as a parquet file with two caption columns, and a mask for the even ones."""
    rows = []
    for i in range(count):
        row = {"image": (folder / f"{i:02d}.png").read_bytes(), "long": (folder / f"{i:02d}.txt").read_text(), "short": f"thing {i}"}
        rows.append(row | ({"mask": png(half_white()) if i % 2 == 0 else None} if masks else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def given(*sources):
    return ["data.folder=", f"data.sources={json.dumps(sources)}"]


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def last_state(out):
    return loaded(storage.checkpoints(out / "checkpoints")[-1])


def loaded(path):
    return {name: stored.load() for name, stored in storage.load(path)[0].items()}


def same_to_the_bit(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The loss under a mask


def test_the_loss_under_a_mask_is_the_mean_under_it():
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(4, 3, 5, 6, generator=generator) for _ in range(2))
    mask = torch.rand(4, 1, 5, 6, generator=generator)
    mask[1], mask[2], mask[3] = 1, 0, 0
    mask[2, 0, 1, 2] = 0.25
    losses = flow.cfm_loss(prediction, target, mask)
    squared = (prediction - target).double().square()
    expected = [(squared[i] * mask[i]).sum() / (3 * mask[i].sum()) for i in range(3)]
    torch.testing.assert_close(losses[:3].double(), torch.stack(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[1], flow.cfm_loss(prediction, target)[1])
    torch.testing.assert_close(losses[2].double(), squared[2, :, 1, 2].mean(), rtol=1e-5, atol=0)
    assert losses[3] == 0


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 1, 5, 1), (1, 1, 5, 6), (4, 5, 6)])
def test_a_mask_is_never_broadcast_but_over_channels(shape):
    with pytest.raises(ValueError, match="mask must be"):
        flow.cfm_loss(torch.zeros(4, 3, 5, 6), torch.zeros(4, 3, 5, 6), torch.ones(shape))


def test_a_mask_is_averaged_to_latents_with_its_pictures_own_crop_and_mirror(tmp_path):
    pixels = np.zeros((48, 32), np.uint8)
    pixels[8:20, :6] = 255  # the crop to 32 x 32 takes rows 8 to 40
    Image.fromarray(pixels).save(tmp_path / "m.png")
    mask = load_mask(tmp_path / "m.png", None, (32, 48), Transform(32, 32), 4)
    assert mask.shape == (1, 8, 8) and mask.dtype == torch.float32
    expected = torch.zeros(8, 8)
    expected[:3, 0], expected[:3, 1] = 1, 0.5
    assert torch.equal(mask[0], expected)
    assert torch.equal(load_mask(tmp_path / "m.png", None, (32, 48), Transform(32, 32, flip=True), 4)[0], expected.flip(1))
    with pytest.raises(UnreadableImage, match=r"m\.png is 32 x 48, its picture 32 x 32: make them one size"):
        load_mask(tmp_path / "m.png", None, (32, 32), Transform(32, 32), 4)
    pixels[8:40] = 0
    pixels[:8] = 255
    Image.fromarray(pixels).save(tmp_path / "m.png")
    with pytest.raises(UnreadableImage, match="black wherever"):
        load_mask(tmp_path / "m.png", None, (32, 48), Transform(32, 32), 4)


def test_masks_reach_the_loss_of_their_own_samples(tmp_path, start, pictures):
    path = write_parquet(pictures, tmp_path / "x.parquet", masks=True)
    source = {"path": str(path), "caption_columns": {"long": 3, "short": 1}, "mask_column": "mask"}
    trainer = start(tmp_path / "out", *given(source), "data.flip=true", "train.batch_size=10", "train.dropout=0")
    batch = next(iter(trainer.micro_batches()))
    assert batch.mask.shape == (10, 1, 8, 8)
    left, right = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    left[..., :4], right[..., 4:] = 1, 1
    seen = set()
    for name, mask, moments in zip(batch.ids, batch.mask, batch.moments, strict=True):
        sample = next(s for s in trainer.data.samples if s.id == name)
        cached = {f: read(trainer.data.cache, trainer.data.image_key(sample, f))["moments"].float() for f in (False, True)}
        (flip,) = (f for f, value in cached.items() if torch.equal(moments, value))
        wanted = torch.ones(1, 8, 8) if sample.mask is None else right if flip else left
        assert torch.equal(mask, wanted)
        seen.add((sample.mask is None, flip))
    assert len(seen) == 4
    with torch.no_grad():
        arguments = (trainer.models.null, trainer.objective)
        masked = cfm_losses(trainer.models.network, batch, *arguments)[0]
        whole, other = batch.mask, 1 - batch.mask
        batch.mask = None
        full = cfm_losses(trainer.models.network, batch, *arguments)[0]
        batch.mask = other
        rest = cfm_losses(trainer.models.network, batch, *arguments)[0]
    halves = torch.tensor([mask.mean() == 0.5 for mask in whole])
    torch.testing.assert_close(((masked + rest) / 2)[halves], full[halves])
    torch.testing.assert_close(masked[~halves], full[~halves])
    assert (masked - full)[halves].abs().min() > 1e-4


def test_a_mask_that_cannot_be_used_leaves_its_sample_out_by_name(tmp_path, run, make_pictures, capsys):
    data = make_pictures(tmp_path / "pictures", 5)
    half_white((16, 32)).save(data / "01.mask.png")
    half_white().save(data / "02.mask.png")
    (data / "03.mask.png").write_bytes(b"no picture")
    out = run(tmp_path / "out", f"data.folder={data}", f"data.cache={tmp_path / 'cache'}", "train.steps=2")
    printed = capsys.readouterr().out
    assert "01.mask.png is 16 x 32, its picture 32 x 32" in printed and "03.mask.png: not a picture" in printed
    assert "2 of 5 pictures cannot be read and are left out" in printed and len(rows_of(out)) == 2


# Regularisation


def test_the_loss_of_a_regularisation_set_is_weighted_and_logged_by_itself(tmp_path, run, start, pictures, make_pictures):
    prior = make_pictures(tmp_path / "prior", 3, opening="any ")
    sources = given({"path": str(pictures)}, {"path": str(prior), "regularisation": True, "repeats": 3})
    more = [*sources, "train.batch_size=8", "train.gradient_accumulation=2", "train.steps=4", "train.learning_rate=1e-12"]
    logged = {w: rows_of(run(tmp_path / f"out{w}", *more, f"data.prior_weight={w}")) for w in (0, 1, 2.5)}
    trainer = start(tmp_path / "out", *more)
    stream = iter(trainer.micro_batches())
    for step in range(4):
        losses, priors = [], []
        for _ in range(2):
            batch = next(stream)
            with torch.no_grad():
                losses.append(cfm_losses(trainer.models.network, batch, trainer.models.null, trainer.objective)[0])
            priors.append(torch.zeros(4, dtype=torch.bool) if batch.prior is None else batch.prior)
            assert priors[-1].tolist() == [name.startswith("prior/") for name in batch.ids]
        losses, is_prior = torch.cat(losses), torch.cat(priors)
        for weight, rows in logged.items():
            assert rows[step]["loss"] == pytest.approx((losses * torch.where(is_prior, weight, 1)).mean().item(), rel=1e-4)
            if is_prior.any():
                assert rows[step]["prior_loss"] == pytest.approx(losses[is_prior].mean().item(), rel=1e-4)
            else:
                assert "prior_loss" not in rows[step]
    assert any("prior_loss" in row for row in logged[1])


def test_a_regularisation_set_of_weight_zero_moves_nothing(tmp_path, run, pictures, make_pictures):
    """Its pictures may be any: with prior_weight 0 only its share of the mean is felt."""
    made = []
    for name, opening in (("x", "any "), ("y", "other ")):
        prior = make_pictures(tmp_path / name / "prior", 4, opening=opening)
        sources = given({"path": str(pictures)}, {"path": str(prior), "regularisation": True})
        made.append(last_state(run(tmp_path / f"out-{name}", *sources, "data.prior_weight=0", "train.dropout=0")))
        made.append(last_state(run(tmp_path / f"one-{name}", *sources, "data.prior_weight=1", "train.dropout=0")))
    assert same_to_the_bit(made[0], made[2]) and not same_to_the_bit(made[1], made[3])


# Shards and streams


def write_shard(folder, path, count=5):
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            for suffix in ("png", "txt"):
                archive.add(folder / f"{i:02d}.{suffix}", f"{i:02d}.{suffix}")
    return path


def sources_of(kind, folder, pictures):
    """Five pictures as a shard behind a file:// URL, or as a stream of a saved dataset."""
    if kind == "shard":
        return given({"url": f"file://{write_shard(pictures, folder / 'x.tar')}"})
    import datasets

    rows = [{"image": (pictures / f"{i:02d}.png").read_bytes(), "text": (pictures / f"{i:02d}.txt").read_text()} for i in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return given({"dataset": str(folder / "saved"), "streaming": True})


@pytest.mark.parametrize("kind", ["shard", "stream"])
def test_every_kind_shares_the_cache_of_a_folder_and_trains(tmp_path, run, start, pictures, kind):
    data = sources_of(kind, tmp_path, pictures)
    plain = {s.captions: key for t in [start(tmp_path / "plain")] for s in t.data.samples for key in [t.data.image_key(s, False)]}
    trainer = start(tmp_path / "other", *data)
    assert len(trainer.data.samples) == 5
    assert all(trainer.data.image_key(sample, False) == plain[sample.captions] for sample in trainer.data.samples)
    out = run(tmp_path / "out", *data, "data.flip=true", f"data.cache={tmp_path / 'cache'}")
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["shard", "stream"])
def test_once_cached_a_run_does_not_need_the_shard_again(tmp_path, start, pictures, kind):
    data = sources_of(kind, tmp_path, pictures)
    trainer = start(tmp_path / "out", *data, f"data.cache={tmp_path / 'cache'}")
    (tmp_path / "x.tar").unlink() if kind == "shard" else shutil.rmtree(tmp_path / "saved")
    trainer.train()
    assert len(rows_of(tmp_path / "out")) == 6


def test_a_changed_shard_is_noticed_when_resuming_and_while_caching(tmp_path, run, start, pictures, after_listing):
    path = tmp_path / "x.tar"
    data = sources_of("shard", tmp_path, pictures)
    out = run(tmp_path / "out", *data, "train.steps=2", "output.checkpoint_every=1")
    (out / "model").rename(tmp_path / "model")
    before = path.read_bytes()
    with tarfile.open(path) as archive:
        offset = archive.getmember("02.png").offset_data
    after = bytearray(before)
    after[offset + 60] ^= 1  # one bit of a picture: size and time say nothing
    path.write_bytes(after)
    with pytest.raises(InputError, match="pictures.* of this run are not those"):
        start(out, *data, "train.steps=2", resume=True)
    path.write_bytes(before)
    start(out, *data, "train.steps=2", resume=True)
    after_listing(lambda: path.write_bytes(after))
    with pytest.raises(InputError, match=r"x\.tar/02\.png changed while it was being cached; start again"):
        start(tmp_path / "new", *data, f"data.cache={tmp_path / 'cache'}")


# Epochs and resuming


def test_a_source_in_a_list_is_the_folder_by_another_name(tmp_path, start, pictures):
    plain, listed = start(tmp_path / "a"), start(tmp_path / "b", *given({"path": str(pictures)}))
    assert [f"pictures/{s.id}" for s in plain.data.samples] == [s.id for s in listed.data.samples]
    assert [plain.data.image_key(s, False) for s in plain.data.samples] == [listed.data.image_key(s, False) for s in listed.data.samples]


def test_a_run_of_weighted_sources_resumes_to_the_bit(tmp_path, run, start, pictures):
    path = write_parquet(pictures, tmp_path / "x.parquet", masks=True)
    sources = given(
        {"path": str(pictures), "weight": 0.6},
        {"path": str(path), "caption_columns": {"long": 3, "short": 1}, "mask_column": "mask", "repeats": 2, "weight": 1.3},
    )
    whole = run(tmp_path / "whole", *sources, "output.checkpoint_every=3")
    (tmp_path / "parts").mkdir()
    for name in ("checkpoints", "metrics.jsonl"):
        (tmp_path / "whole" / name).rename(tmp_path / "parts" / name)
    first = storage.checkpoints(tmp_path / "parts" / "checkpoints")
    expected, rows = loaded(first[-1]), rows_of(tmp_path / "parts")
    assert len(first) == 2
    shutil.rmtree(first[-1])
    run(tmp_path / "parts", *sources, "output.checkpoint_every=3", resume=True)
    assert same_to_the_bit(last_state(tmp_path / "parts"), expected) and whole.exists()
    assert [row["loss"] for row in rows_of(tmp_path / "parts")] == [row["loss"] for row in rows]
    trainer = start(tmp_path / "other", *sources)
    assert Mixture.of(trainer.data.samples, 0).per_epoch() == 6 + 13


def test_two_processes_train_as_one(tmp_path, run, options, pictures, make_pictures, monkeypatch):
    """Masks, repeats, weights and a regularisation set over two ranks and their loader workers: the same samples, the same numbers."""
    path = write_parquet(pictures, tmp_path / "x.parquet", masks=True)
    prior = make_pictures(tmp_path / "prior", 3, opening="any ")
    sources = given(
        {"url": f"file://{write_shard(pictures, tmp_path / 'x.tar')}", "weight": 0.6},
        {"path": str(path), "caption_columns": {"long": 3, "short": 1}, "mask_column": "mask", "repeats": 2},
        {"path": str(prior), "regularisation": True},
    )
    more = [*sources, "data.prior_weight=0.5", "train.batch_size=8", "train.steps=4"]
    one, two = run(tmp_path / "one", *more), tmp_path / "two"
    from torture import Started

    started = Started(options(two, *more, "data.workers=1"), False, tmp_path / "log", processes=2)
    assert started.finish(300) == 0, started.log.read_text()[-3000:]
    for name in ("loss", "prior_loss", "gradient_norm"):
        assert [row.get(name, -1) for row in rows_of(two)] == pytest.approx([row.get(name, -1) for row in rows_of(one)], rel=1e-4)
    assert any("prior_loss" in row for row in rows_of(one))


@pytest.mark.parametrize("change", ["picture", "mask", "no masks", "caption", "weight"])
def test_a_resumed_run_notices_what_changed(tmp_path, run, start, pictures, change):
    path = write_parquet(pictures, tmp_path / "x.parquet", masks=True)
    weights = {"long": 3, "short": 1}
    source = {"path": str(path), "caption_columns": weights, "mask_column": "mask"}
    out = run(tmp_path / "out", *given(source), "train.steps=2", "output.checkpoint_every=1")
    (out / "model").rename(tmp_path / "model")
    start(out, *given(source), "train.steps=2", resume=True)
    rows = pq.read_table(path).to_pylist()
    if change == "picture":
        rows[2]["image"] = rows[3]["image"]
    elif change == "mask":
        rows[2]["mask"] = png(Image.fromarray(np.full((32, 32), 255, np.uint8)))
    elif change == "no masks":
        rows = [row | {"mask": None} for row in rows]
    elif change == "caption":
        rows[2]["short"] = "another"
    else:
        source["caption_columns"] = weights | {"short": 2}
    pq.write_table(pa.Table.from_pylist(rows), path)
    message = {"caption": "^captions of this run", "weight": "data.sources was"}.get(change, "^pictures of this run")
    with pytest.raises(InputError, match=message):
        start(out, *given(source), "train.steps=2", resume=True)
