"""A model over several processes: what torch, accelerate and transformers leave to the model's package."""
