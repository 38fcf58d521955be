"""Settings as dataclasses with ranges and choices, and presets as TOML files."""
