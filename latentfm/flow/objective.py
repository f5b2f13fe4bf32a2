"""The conditional flow matching loss (notes, eq. 26 and Theorem 12)."""

from torch import Tensor


def cfm_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error of each sample, [B] float32 (notes, eq. 31; Alg. 3 and, with labels, Alg. 5).

    The notes sum over the dimensions of x; the mean is that sum over their number, so that one learning rate serves
    every resolution. The batch is left unreduced for the caller to weight, average or report by t.

    Args:
        prediction: the network's velocity u(x_t, t), [B, ...], any floating dtype.
        target: the conditional velocity `sample_path(...).velocity`, of the same shape.

    Raises:
        ValueError: the shapes differ (they are never broadcast) or have no batch dimension.
    """
    if prediction.shape != target.shape or prediction.ndim == 0:
        raise ValueError(
            f"prediction and target must have one shape [B, ...], got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
    squared = (prediction.float() - target.float()).square()
    return squared.unsqueeze(-1).flatten(1).mean(1)
