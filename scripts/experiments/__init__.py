"""One file for each experiment. `python scripts/experiment.py` lists and runs them; scripts/analysis/study.py explains the fields."""
