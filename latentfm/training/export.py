"""The result of a run as a stock pipeline folder."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentfm.config import RunConfig
from latentfm.files import whole_or_nothing
from latentfm.models.folder import INFO_FILE, write_stock_names
from latentfm.models.mmdit import MMDiT
from latentfm.models.text import NULL_FILE
from latentfm.training.prepare import Models


def write_pipeline(
    target: Path, models: Models, network: MMDiT, averages: Mapping[str, Tensor], config: RunConfig, lengths: list[int]
) -> None:
    """Writes `target`: the frozen components copied from the base folder, the network, the null condition; all of it or nothing.

    The network's weights are its float32 `averages`, and its own where there is none.
    """
    dtype = getattr(torch, config.output.dtype)
    weights = {name: value.detach().to("cpu", dtype) for name, value in (network.state_dict() | dict(averages)).items()}
    copy = MMDiT.from_config(network.config).to(dtype)
    copy.load_state_dict(weights, assign=True)
    trained = {"steps": config.train.steps, "batch_size": config.train.batch_size, "seed": config.train.seed, "t5_lengths": lengths}
    with whole_or_nothing(target) as folder:
        folder.mkdir()
        for name in sorted(p.name for p in models.folder.iterdir()):
            if name not in ("transformer", NULL_FILE, INFO_FILE, "README.md") and not name.startswith("."):
                source = models.folder / name
                shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
        copy.save_pretrained(folder / "transformer", safe_serialization=True)
        models.null.save(folder)
        info = {"format": 1, **models.info, "trained": trained}
        (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", "utf-8")
        write_stock_names(folder)
