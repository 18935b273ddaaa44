"""One file an experiment; `python scripts/experiment.py` lists and runs them, and scripts/analysis/study.py says what a file holds."""
