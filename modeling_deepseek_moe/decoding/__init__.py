"""Decoding with the model's own draft: MTP layers propose tokens, and one pass of the model verifies them all."""
