"""AsymCheck for DeepSpeed engines: `asymcheck_torch.attach(engine, ...)`, or `use` for scripts
that call `engine.save_checkpoint` and `engine.load_checkpoint`.
"""

from asymcheck_torch.deepspeed.checkpoint_engine import use

__all__ = ["use"]
