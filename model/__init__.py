"""GPT-2 with a choice of residual rule."""
