"""AsymCheck: checkpoints at every training step, lossless, committed atomically, readable anywhere."""
