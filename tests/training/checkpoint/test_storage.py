"""Checkpoints: whole or absent, the newest and the best kept, and a run that goes on from one as if it had never stopped."""

import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import files_no_larger_than
from torch import nn

from latentfm.errors import InputError
from latentfm.training.checkpoint import storage
from latentfm.training.checkpoint.state import pack, unpack
from latentfm.training.distributed.shards import Chunk, LocalShards
from latentfm.training.optimizers.adamw import AdamW
from latentfm.training.optimizers.ema import EMA

MAIN = SimpleNamespace(is_main_process=True, num_processes=1)


def save(folder, step, tensors, info=None, **more):
    chunks = {name: Chunk(value, 0, value.shape) for name, value in tensors.items()}
    return storage.save(folder, step, chunks, info or {}, MAIN, **more)


def everything_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    tensors = {
        "a": torch.randn(3, 4), "half": torch.randn(5).to(torch.bfloat16), "count": torch.tensor(7.0), "turned": torch.randn(3, 4).T,
        "empty": torch.zeros(0),
    }  # fmt: skip
    path = save(tmp_path, 12, tensors, {"config": {"a": [1, 2]}})
    assert path == tmp_path / "step-00000012"
    loaded, info = storage.load(path)
    assert info["step"] == 12 and info["config"] == {"a": [1, 2]} and list(info["files"]) == ["state.safetensors"]
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name].load(), value)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_a_large_state_lies_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("latentfm.training.checkpoint.storage.LARGEST_FILE", 1000)
    tensors = {str(i): torch.randn(200) for i in range(3)}
    path = save(tmp_path, 1, tensors)
    loaded, info = storage.load(path)
    assert len(info["files"]) == 3 and all(torch.equal(loaded[name].load(), value) for name, value in tensors.items())


def test_the_newest_are_kept(tmp_path):
    for step in (2, 10, 100, 9):  # 9: a run that goes on from an older one
        save(tmp_path, step, {"a": torch.tensor([float(step)])}, keep=3)
    assert [p.name for p in storage.checkpoints(tmp_path)] == ["step-00000009", "step-00000010", "step-00000100"]
    save(tmp_path, 101, {"a": torch.zeros(1)}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000101"]


def test_the_best_is_kept_besides(tmp_path):
    for step, loss in ((1, 0.9), (2, 0.3), (3, 0.5), (4, None), (5, float("nan")), (6, 0.4)):
        save(tmp_path, step, {"a": torch.zeros(1)}, {} if loss is None else {"validation_loss": loss}, keep=2)
    assert [p.name for p in storage.checkpoints(tmp_path)] == ["step-00000002", "step-00000005", "step-00000006"]
    assert storage.best(storage.checkpoints(tmp_path)).name == "step-00000002"
    save(tmp_path, 7, {"a": torch.zeros(1)}, {"validation_loss": 0.1}, keep=1)
    assert [p.name for p in storage.checkpoints(tmp_path)] == ["step-00000007"]


def test_what_is_not_a_whole_checkpoint_is_ignored(tmp_path):
    assert storage.checkpoints(tmp_path / "missing") == []
    whole = save(tmp_path, 5, {"a": torch.zeros(1)})
    for name in ("step-00000009.partial", "step-00000009", "step-9", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009.partial" / "state.json").write_text("{}")
    (tmp_path / "other" / "state.json").write_text("{}")
    assert storage.checkpoints(tmp_path) == [whole]


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / "step-00000003.partial").mkdir()
    (tmp_path / "step-00000003.partial" / "state.safetensors").write_bytes(b"half")
    save(tmp_path, 4, {"a": torch.zeros(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def flipped(data):
    return data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 8 + b[8:], flipped])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, file, damage):
    if (file, damage) == ("state.json", flipped):
        pytest.skip("a flipped bit of the description may be harmless")
    before, path = (save(tmp_path, step, {"a": torch.randn(64)}, {"config": {}}) for step in (1, 2))
    (path / file).write_bytes(damage((path / file).read_bytes()))
    with pytest.raises(InputError, match="step-00000002 cannot be read.*move it away"):
        storage.load(path)
    told = []
    assert storage.newest_whole(tmp_path, told.append) == before
    assert len(told) == 1 and "step-00000002" in told[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002.damaged"]  # nothing is deleted


def test_with_no_whole_checkpoint_the_reason_is_said(tmp_path):
    path = save(tmp_path, 1, {"a": torch.randn(64)})
    (path / "state.safetensors").unlink()
    told = []
    with pytest.raises(InputError, match="step-00000001 cannot be read .*called step-00000001.damaged, and there is none before it; leave"):
        storage.newest_whole(tmp_path, told.append)
    assert told == []  # of one before that would be taken


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path):
    save(tmp_path, 1, {"a": torch.ones(100)}, {"config": {}})
    before = everything_in(tmp_path)
    with files_no_larger_than(100_000), pytest.raises(InputError, match="step-00000002.*nothing saved earlier was touched"):
        save(tmp_path, 2, {"a": torch.zeros(100_000)}, {"config": {}})
    assert everything_in(tmp_path) == before
    assert torch.equal(storage.load(storage.checkpoints(tmp_path)[-1])[0]["a"].load(), torch.ones(100))


def test_a_full_disk_at_the_description_leaves_nothing_either(tmp_path):
    with files_no_larger_than(10_000), pytest.raises(InputError, match="step-00000002"):
        save(tmp_path, 2, {"a": torch.zeros(1)}, {"samples": ["x" * 100] * 1000})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make, dtype",
    [
        (partial(torch.optim.AdamW, fused=True), torch.float32), (partial(torch.optim.AdamW, fused=False), torch.float32),
        (AdamW, torch.bfloat16), (partial(AdamW, master_weights=True), torch.bfloat16),
        (partial(AdamW, moments=torch.bfloat16), torch.bfloat16),
    ],
    ids=["fused", "one by one", "stochastic rounding", "master weights", "bfloat16 moments"],
)  # fmt: skip
def test_a_restored_run_takes_the_same_steps(tmp_path, make, dtype):
    def fresh():
        torch.manual_seed(1)
        module = nn.Linear(4, 3).to(dtype)
        groups = [{"params": [module.weight], "weight_decay": 0.1}, {"params": [module.bias], "weight_decay": 0.0}]
        shards = LocalShards(module)
        return module, shards, EMA(shards.parameters, 0.5), make(groups, lr=0.1)

    def step(module, shards, ema, optimizer, seed):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
        ema.update(shards.parameters, seed + 1)

    first = fresh()
    for seed in range(3):
        step(*first, seed)
    path = storage.save(tmp_path, 3, pack(*first[1:]), {}, MAIN)
    second = fresh()
    unpack(storage.load(path)[0], *second[1:])
    for seed in range(3, 6):
        step(*first, seed)
        step(*second, seed)
    expected, found = ({name: chunk.value for name, chunk in pack(*run[1:]).items()} for run in (first, second))
    assert expected.keys() == found.keys() and len(expected) >= 10
    assert all(value.dtype == found[name].dtype and torch.equal(value, found[name]) for name, value in expected.items())


def test_a_state_of_other_parameters_is_refused_by_name(tmp_path):
    shards = LocalShards(nn.Linear(2, 2))
    ema, optimizer = EMA(shards.parameters, 0.5), torch.optim.AdamW(shards.parameters.values())
    path = storage.save(tmp_path, 1, pack(shards, ema, optimizer), {}, MAIN)
    tensors = storage.load(path)[0]
    other = LocalShards(nn.Linear(2, 2, bias=False))
    with pytest.raises(InputError, match=r"ema\.bias, model\.bias"):
        unpack(tensors, other, EMA(other.parameters, 0.5), torch.optim.AdamW(other.parameters.values()))
    with pytest.raises(InputError, match="nothing_like_it"):
        unpack(tensors | {"optimizer.exp_avg/nothing_like_it": tensors["model.bias"]}, shards, ema, optimizer)


def test_the_description_is_readable(tmp_path):
    path = save(tmp_path, 7, {"a": torch.zeros(1)}, {"config": {"train": {"steps": 9}}, "validation_loss": 0.25})
    info = json.loads((path / "state.json").read_text())
    assert info["config"]["train"]["steps"] == 9 and info["validation_loss"] == 0.25


def state_texts(path):
    text = (path / "state.json").read_text()
    return text, [i for i, letter in enumerate(text) if not letter.isspace()]


def test_any_letter_of_the_description_that_is_flipped_is_noticed(tmp_path):
    config = {"train": {"steps": 9, "learning_rate": 1e-4}, "data": {"t5_lengths": {8: 0.5, 12: 0.5}}}
    info = {"config": config, "inputs": {"pictures": "af"}}
    path = save(tmp_path, 7, {"a": torch.zeros(1)}, info | {"data": {"step": 7, "seed": 0}, "validation_loss": 0.25})
    assert storage.load(path)[1]["config"]["data"]["t5_lengths"] == {"8": 0.5, "12": 0.5}
    text, places = state_texts(path)
    rng = np.random.default_rng(0)
    for place in places:
        other = chr(ord(text[place]) ^ int(rng.choice([1, 2, 4, 16])))
        (path / "state.json").write_text(text[:place] + other + text[place + 1 :])
        with pytest.raises(storage.DamagedCheckpoint, match="move it away"):
            storage.load(path)
    (path / "state.json").write_text(json.dumps(json.loads(text), indent=3))  # laid out otherwise it says the same
    assert storage.load(path)[1]["inputs"] == {"pictures": "af"}


DAMAGES = ["{", "[]", "5", "", "\x00", "[" * 100_000, '{"files": []}', '{"files": {}, "checksum": "x"}', "\ud800"]


@pytest.mark.parametrize("text", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_description_is_renamed_and_the_one_before_is_taken(tmp_path, text):
    first, second = (save(tmp_path, step, {"a": torch.zeros(1)}) for step in (1, 2))
    (second / "state.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    (tmp_path / "step-00000002.damaged").mkdir()  # of another time
    told = []
    assert storage.newest_whole(tmp_path, told.append) == first
    assert (tmp_path / "step-00000002.damaged-2" / "state.safetensors").is_file()
    assert len(told) == 1 and "step-00000002.damaged-2, going on from the one before" in told[0] and "\n" not in told[0]
    assert storage.best([first, tmp_path / "step-00000002.damaged-2"]) is None


def test_a_checkpoint_without_its_description_is_not_passed_over_in_silence(tmp_path):
    first, second = (save(tmp_path, step, {"a": torch.zeros(1)}) for step in (1, 2))
    (second / "state.json").unlink()
    told = []
    assert storage.newest_whole(tmp_path, told.append) == first
    assert len(told) == 1 and "state.json is missing" in told[0] and (tmp_path / "step-00000002.damaged").is_dir()


def test_a_description_that_is_no_file_is_not_waited_for(tmp_path):
    first, second = (save(tmp_path, step, {"a": torch.zeros(1)}) for step in (1, 2))
    (second / "state.json").unlink()
    os.mkfifo(second / "state.json")
    assert storage.newest_whole(tmp_path, print) == first


def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1, {"a": torch.zeros(1)})
    path = save(tmp_path, 2, {"a": torch.zeros(1)})

    def fails(error):
        def read(*given):
            raise error

        return read

    for place in ("read_bytes", "checksum", "read_chunks"):
        for number in (5, 116, 2):  # an error of the disk, of a network's file system, and what is gone for a moment
            with monkeypatch.context() as patch:
                patch.setattr(storage, place, fails(OSError(number, os.strerror(number))))
                with pytest.raises(InputError, match="cannot be read now"):
                    storage.newest_whole(tmp_path, print)
            assert [path.name for path in storage.checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
        for error, kind in ((OSError(5, "Input/output error"), InputError), (MemoryError(), MemoryError)):
            with monkeypatch.context() as patch:
                patch.setattr(storage, place, fails(error))
                with pytest.raises(kind) as caught:
                    storage.newest_whole(tmp_path, print)
            assert not isinstance(caught.value, storage.DamagedCheckpoint)
            assert kind is MemoryError or "Input/output error. Nothing was renamed" in str(caught.value)
    assert storage.newest_whole(tmp_path, print) == path


def test_a_description_of_before_there_were_checksums_is_taken(tmp_path):
    path = save(tmp_path, 1, {"a": torch.zeros(1)}, {"config": {}, "inputs": {}, "data": {}})
    info = json.loads((path / "state.json").read_text())
    del info["checksum"]
    (path / "state.json").write_text(json.dumps(info))
    assert storage.load(path)[1] == info
    for odd in (info | {"chfcksum": 1}, info | {"config": 5}, {name: info[name] for name in info if name != "data"}):
        (path / "state.json").write_text(json.dumps(odd))
        with pytest.raises(storage.DamagedCheckpoint):
            storage.load(path)


def test_an_older_checkpoint_that_cannot_be_removed_is_told_and_the_new_one_is_saved(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1, {"a": torch.zeros(1)}, keep=1)

    def refuses(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage.shutil, "rmtree", refuses)
    path = save(tmp_path, 2, {"a": torch.zeros(1)}, keep=1)
    assert storage.load(path) and "step-00000001 could not be removed: Permission denied" in capsys.readouterr().out


def test_what_fails_after_a_checkpoint_is_in_place_does_not_make_it_unsaved(tmp_path, monkeypatch, capsys):
    save(tmp_path, 2, {"a": torch.zeros(1)})
    save(tmp_path, 1, {"a": torch.zeros(1)}, keep=2)

    def refuses(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("latentfm.files.shutil.rmtree", refuses)  # of what stood under the same name
        path = save(tmp_path, 2, {"a": torch.ones(1)})
    assert storage.load(path)[0]["a"].load() == 1 and storage.checkpoints(tmp_path)[-1] == path
    monkeypatch.setattr(storage, "best", refuses)
    assert storage.load(save(tmp_path, 3, {"a": torch.ones(1)}))
    assert "could not be removed: Input/output error; what was saved since is whole" in capsys.readouterr().out


def test_an_older_checkpoint_is_under_another_name_while_it_is_removed(tmp_path, monkeypatch):
    save(tmp_path, 1, {"a": torch.zeros(1)}, keep=1)
    removed = []
    monkeypatch.setattr(storage.shutil, "rmtree", lambda path: removed.append(path.name))
    path = save(tmp_path, 2, {"a": torch.zeros(1)}, keep=1)
    assert removed == ["step-00000001.partial"] and storage.checkpoints(tmp_path) == [path]
