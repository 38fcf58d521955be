"""Settings: dataclasses with ranges and choices, and the presets."""
