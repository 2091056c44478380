"""``python -m modeling_deepseek_moe.conversion NAME IN OUT``: as ``deepseek-moe convert NAME IN OUT``."""

import sys

from modeling_deepseek_moe.cli import app

if __name__ == "__main__":
    app(["convert", *sys.argv[1:]], prog_name="deepseek-moe")
