"""Short commands over the other rooms; run each as `python scripts/<name>.py`."""
