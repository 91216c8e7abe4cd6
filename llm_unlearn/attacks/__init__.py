"""Is it really gone? Attacks on checkpoints: relearning, quantization, sampling, and a look inside."""
