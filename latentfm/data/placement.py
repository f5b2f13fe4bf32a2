"""What a run makes of the pictures of a dataset once their sizes are known: their buckets, what is left out, and what is drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from latentfm.data.buckets import DataPlan
from latentfm.data.mixture import Mixture
from latentfm.data.sources.base import Sample

HoldOut = Callable[[Sequence[Sample]], Sequence[int]]  # which of the samples that can be used a run keeps for its validation


@dataclass(frozen=True, eq=False)
class Placement:
    """Of N samples, arrays [N]: the bucket, the share lost to its crop, whether it is used, and whether it is trained on.

    sizes: [N, 2] (width, height). usable: whether the picture can be read; where not, bucket and share are 0.
    """

    samples: Sequence[Sample]
    sizes: np.ndarray
    usable: np.ndarray
    plan: DataPlan
    bucket_of: np.ndarray
    lost: np.ndarray
    used: np.ndarray
    trained: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[Sample], sizes: np.ndarray, usable: np.ndarray, plan: DataPlan, hold_out: HoldOut) -> "Placement":
        bucket_of, lost, used = np.zeros(len(samples), np.int64), np.zeros(len(samples)), usable.copy()
        bucket_of[usable], lost[usable], used[usable] = plan.place(sizes[usable])
        trained, places = used.copy(), np.flatnonzero(used)
        trained[places[list(hold_out([samples[index] for index in places]))]] = False
        return cls(samples, sizes, usable, plan, bucket_of, lost, used, trained)

    @cached_property
    def mixture(self) -> Mixture:
        """What is drawn of them; its seed is not the run's."""
        return Mixture.of(self.samples, 0, np.where(self.trained, self.bucket_of, -1))

    def left_out(self) -> list[int]:
        """The samples that would lose too much to the crop, the worst first."""
        worst_first = np.argsort(-self.lost, kind="stable")
        return worst_first[(self.usable & ~self.used)[worst_first]].tolist()

    def buckets(self, counted: np.ndarray) -> list[dict[str, Any]]:
        """A row for each bucket, of the pictures `counted`, bool [N]; shares and crops in [0, 1].

        Draws and steps an epoch are in the mean: no draw is dropped or padded, what is over waits for the next epoch.
        """
        rows = []
        for bucket, (width, height) in enumerate(self.plan.buckets.shapes):
            here = self.bucket_of == bucket
            mine = np.flatnonzero(counted & here)
            lost, draws = self.lost[mine], self.mixture.per_epoch(bucket)
            rows.append({
                "width": width, "height": height, "pictures": len(mine), "share": len(mine) / max(1, int(counted.sum())),
                "mean_crop": float(lost.mean()) if len(mine) else 0.0, "worst_crop": float(lost.max(initial=0.0)),
                "worst": self.samples[mine[lost.argmax()]].id if len(mine) else None,
                "enlarged": int((self.sizes[mine] < (width, height)).any(axis=1).sum()),
                "draws_an_epoch": draws, "steps_an_epoch": draws / self.plan.batch_size,
                "left_out": int((self.usable & ~self.used & here).sum()),
            })  # fmt: skip
        return rows
