"""Conversions between the checkpoint formats of the family, shard by shard, without a GPU.

Each is declared in the file named after it, and `_table` lists them; ``diff`` and ``verify`` only read. The files with
an underscore are what they share: what a conversion is (`_conversion`), its input (`_source`), FP8 blocks (`_blocks`),
DeepSeek's own names (`_native`), and the run that writes what was planned (`_job`).
``python -m modeling_deepseek_moe.conversion NAME IN OUT`` is ``deepseek-moe convert NAME IN OUT``.
"""
