"""The commands of `ddpm-hf`, a module each, and what several of them need; cli.py finds them by name."""
