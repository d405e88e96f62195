"""Quality of samples, likelihoods, and verification of saved pipelines."""
