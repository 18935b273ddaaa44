"""What is made of recorded runs: means and errors, tables, and pictures."""
