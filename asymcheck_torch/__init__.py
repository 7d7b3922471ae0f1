"""AsymCheck for PyTorch: attach it to a training loop, which stays as it is.

>>> ckpt = asymcheck_torch.attach(model, optimizer, url="file:///runs/a")  # doctest: +SKIP
>>> first = ckpt.restore()  # doctest: +SKIP
"""

from asymcheck_torch.extras import at_forward, at_update
from asymcheck_torch.loading import load
from asymcheck_torch.training import TrainingCheckpointer, attach

__all__ = ["TrainingCheckpointer", "at_forward", "at_update", "attach", "load"]
