"""AsymCheck for DeepSpeed engines."""
