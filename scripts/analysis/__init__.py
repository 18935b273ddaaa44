"""What is read from finished runs: the runs themselves, means and errors, tables, and pictures."""
