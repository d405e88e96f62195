"""The commands of `ddpm-hf`, one module each; `run(arguments)` does the work and returns the exit code."""
