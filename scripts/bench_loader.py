"""The loader alone: cached samples a second and memory, beside a DataLoader over one file a sample.

    python scripts/bench_loader.py                        # 20,000 samples of the bundled model's shapes, 2 loader processes, best of 3
    python scripts/bench_loader.py --samples 100000 --peer-samples 0 --rounds 1        # memory over an epoch of 100,000
    python scripts/bench_loader.py --moments 32 128 128 --prompts sd3 --samples 500    # SD3's, 1024 pixels

Both read random entries of the same shapes, in a random order, with the same noise drawn for each. The peer is what the usual script
does: torch's DataLoader over a folder of safetensors, one a sample with its latents and its prompt, in RAM as a list of paths.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from latentfm.data.cache.fill import Writer
from latentfm.data.cache.store import Cache, key_of
from latentfm.data.cached import CachedReader
from latentfm.data.loader import Draws, Dropout, Loader
from latentfm.data.mixture import Mixture
from latentfm.data.sources import Sample
from latentfm.data.stream import Stream
from latentfm.data.table import SampleTable

PROMPTS = {  # by model: the shapes of a prompt's embeddings
    "bundled": {"clip_1": (24, 128), "pooled_1": (128,), "clip_2": (24, 192), "pooled_2": (192,), "t5": (24, 320)},
    "sd3": {"clip_1": (77, 768), "pooled_1": (768,), "clip_2": (77, 1280), "pooled_2": (1280,), "t5": (256, 4096)},
}
DISTINCT = 64  # entries of random numbers; the others repeat them


def filled(folder: Path, samples: tuple[Sample, ...], moments: tuple[int, ...], prompts: dict[str, tuple[int, ...]]) -> CachedReader:
    """A reader over a cache of random entries, one picture and one caption a sample."""
    generator = torch.Generator().manual_seed(0)
    images = [{"moments": torch.randn(moments, generator=generator).to(torch.bfloat16)} for _ in range(DISTINCT)]
    texts = [{name: torch.randn(s, generator=generator).to(torch.bfloat16) for name, s in prompts.items()} for _ in range(DISTINCT)]
    cache, keys = Cache(folder), {"moments": [], "prompts": []}
    for kind, entries in (("moments", images), ("prompts", texts)):
        with Writer(cache, kind) as writer:
            for number in range(len(samples)):
                keys[kind].append(key_of(kind, str(number)))
                writer.add(keys[kind][-1], entries[number % DISTINCT])
    length = prompts["t5"][0]
    draws = Draws(0, Dropout(0.1, 0.0))
    return CachedReader(SampleTable.of(samples), draws, cache.entries(keys["moments"]), {length: cache.entries(keys["prompts"])})


class OneFileASample(Dataset):
    """The peer: path by path, everything of a sample in one file."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        entry = load_file(self.paths[index])
        moments = entry["moments"].float()
        shape = (moments.shape[0] // 2, *moments.shape[1:])
        return entry | {"moments": moments, "u": torch.rand(()), "vae_noise": torch.randn(shape), "eps": torch.randn(shape)}


def peer(folder: Path, reader: CachedReader, count: int) -> OneFileASample:
    """The first `count` samples of `reader`, one file each."""
    folder.mkdir()
    (prompts,) = reader.prompts.values()
    for number in range(count):
        save_file(reader.moments.read(number) | prompts.read(number), folder / f"{number}.safetensors")
    return OneFileASample([folder / f"{number}.safetensors" for number in range(count)])


def memory() -> tuple[float, float]:
    """(resident, proportional) MiB of this process and its children: what is shared counts fully in the one, by its share in the other."""
    resident = proportional = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            resident += int(line.split()[1]) if line.startswith("Rss:") else 0
            proportional += int(line.split()[1]) if line.startswith("Pss:") else 0
    return resident / 1024, proportional / 1024


def timed(batches: Iterable, batch_size: int, warm_up: int = 8) -> tuple[float, list[tuple[float, float]]]:
    """(samples a second after the first `warm_up` batches, memory then, every 500 batches, and at the end)."""
    seconds, count, seen, began = 0.0, 0, [], 0.0
    for number, _ in enumerate(batches):
        now = time.perf_counter()
        if number > warm_up:
            count, seconds = count + batch_size, seconds + now - began
        if number >= warm_up and (number - warm_up) % 500 == 0:
            seen.append(memory())  # not timed
        began = time.perf_counter()
    return count / seconds, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--peer-samples", type=int, default=5_000, help="0: no peer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--moments", type=int, nargs=3, default=(32, 16, 16), help="2C h w")
    parser.add_argument("--prompts", choices=PROMPTS, default="bundled")
    given = parser.parse_args()
    torch.set_num_threads(1)
    least = min(given.samples, given.peer_samples or given.samples) // given.batch_size
    if least < 4:
        parser.error(f"--samples and --peer-samples should be four batches at least, {4 * given.batch_size} or more")
    warm_up = min(8, least // 3)
    samples = tuple(Sample(None, (f"caption {i}",), f"{i:06d}.png") for i in range(given.samples))
    with tempfile.TemporaryDirectory() as temporary:
        reader = filled(Path(temporary) / "cache", samples, tuple(given.moments), PROMPTS[given.prompts])
        (length,) = reader.prompts
        stored = sum(int(entries.rows["length"][0]) for entries in (reader.moments, reader.prompts[length]))
        batch = reader[[(0, 0, 0)], length]
        sent = sum(value.nbytes for value in (batch.moments, batch.vae_noise, batch.eps, *(part for _, part in batch.parts.items())))
        sizes = f"{stored / 1024:.1f} KiB in the cache, {sent / 1024:.1f} KiB in a batch"
        print(f"{given.samples:,} samples of {sizes}; {given.workers} processes read ahead")
        one = peer(Path(temporary) / "peer", reader, min(given.peer_samples, given.samples)) if given.peer_samples else None
        found: dict[str, list[float]] = {"latentfm": [], "one file a sample": []}
        for number in range(given.rounds):
            stream = Stream(Mixture.plain(given.samples), given.batch_size, number)
            loader = Loader(reader, stream, {length: 1.0}, given.samples // given.batch_size, workers=given.workers)
            pace, seen = timed(loader, given.batch_size, warm_up)
            found["latentfm"].append(pace)
            print(f"latentfm: {pace:,.0f} samples/s, {pace * stored / 2**20:,.0f} MB/s read, {pace * sent / 2**20:,.0f} MB/s handed over")
            print("  resident (proportional) MiB: " + ", ".join(f"{rss:,.0f} ({pss:,.0f})" for rss, pss in thinned(seen)))
            if one is not None:
                order = torch.randperm(len(one)).tolist()
                shuffled = DataLoader(one, given.batch_size, sampler=order, num_workers=given.workers, drop_last=True, prefetch_factor=4)
                found["one file a sample"].append(timed(shuffled, given.batch_size, warm_up)[0])
                print(f"one file a sample: {found['one file a sample'][-1]:,.0f} samples/s")
        best = {name: max(paces) for name, paces in found.items() if paces}
        print("best: " + ", ".join(f"{name} {pace:,.0f} samples/s" for name, pace in best.items()))


def thinned(seen: list, most: int = 6) -> list:
    """The first, the last and a few between."""
    return [seen[i] for i in sorted({*np.linspace(0, len(seen) - 1, min(most, len(seen))).astype(int).tolist()})]


if __name__ == "__main__":
    main()
