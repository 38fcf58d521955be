"""Files: atomic writes, downloads, pickles, safetensors."""
