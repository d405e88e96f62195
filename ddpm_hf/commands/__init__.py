"""One module a command of `ddpm-hf`; cli.py finds them by name and turns what goes wrong into sentences."""
