"""The report's page: one HTML file with everything that finished and unfinished runs wrote. `make` is its only entry."""
