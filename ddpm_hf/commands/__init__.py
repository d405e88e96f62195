"""One module a command of `ddpm-hf`; cli.py gives them their names and turns what goes wrong into sentences."""
