"""A run's data in a test: prepared by one process or several, nobody seeing the progress."""

import torch
from data.cache.filling import read
from tiny import data_plan

from latentfm.config import DataOptions
from latentfm.data.cache.processes import ONE_PROCESS
from latentfm.data.cache.shard import read_shard
from latentfm.data.from_options import prepared_data
from latentfm.data.loader import Dropout
from latentfm.data.sources import read_folder

CPU = torch.device("cpu")
NO_DROPOUT = Dropout(0.0, 0.0)


def data_of(dataset, models, options, lengths, processes=ONE_PROCESS):
    """The data of a dataset, in the buckets that the options ask for."""
    return prepared_data(dataset, data_plan(options, models.folder, lengths), models, options, processes)


class Quiet:
    """A progress bar that nobody sees."""

    def add_task(self, description, total):
        return 0

    def advance(self, task, count):
        pass

    def update(self, task, description):
        pass

    def remove_task(self, task):
        pass


def cached(pictures, models, lengths=(8,), processes=ONE_PROCESS, **options):
    given = DataOptions(folder=str(pictures), cache=str(pictures.parent / "cache"), **options)
    return data_of(read_folder(pictures), models, given, lengths, processes)


def keys(data):
    """Every key of a dataset, by what it is for."""
    images = {(sample.id, flip): data.image_key(sample, flip) for sample in data.inventory.dataset.samples for flip in data.inventory.flips}
    texts = {(c, n): data.caption_key(c, n) for sample in data.inventory.dataset.samples for c in sample.captions for n in data.lengths}
    return images | texts


def fill(data):
    """Fills the cache; returns how many entries were made."""
    return sum(map(len, data.prepare(Quiet()).values()))


def entry_of(data, key):
    return read(data.cache, key)


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


def damage(folder, key):
    """Flips a bit of the entry `key`."""
    for path in shards(folder):
        for row in read_shard(path).rows:
            if row["key"].ljust(32, b"\0").hex() == key:
                data = bytearray(path.read_bytes())
                data[int(row["offset"]) + 5] ^= 1
                path.write_bytes(data)
                return path
