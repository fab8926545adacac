"""The bundled tasks as YAML, for ``lmms-eval --include_path``."""
