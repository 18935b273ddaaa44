"""The commands. Run each as `python scripts/<name>.py`."""
