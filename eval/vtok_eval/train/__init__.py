"""Training of the embedded models: ``python -m vtok_eval.train nano-llava``."""
