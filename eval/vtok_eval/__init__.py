"""Tasks, embedded models and data, the harness and its plots will live here; nothing is in it yet."""
