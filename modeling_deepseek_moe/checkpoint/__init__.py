"""Checkpoint folders of safetensors shards: headers, mapped bytes, index files, reading and writing."""
