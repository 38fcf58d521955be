"""What a run is told: settings, presets, and the command line made of them."""
