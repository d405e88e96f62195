"""The commands of `ddpm-hf`, one module each."""
