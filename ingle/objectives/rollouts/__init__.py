"""Learning from sampled answers: the mathematics of advantages, of the KL budget and of importance weights."""
