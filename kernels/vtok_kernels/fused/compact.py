"""Moving tokens in Triton."""
