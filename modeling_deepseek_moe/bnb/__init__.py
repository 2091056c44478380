"""bitsandbytes: which weights are its codes, how they are loaded, kept readable and saved; its experts are in `quantized`."""
