"""Entry of ``python -m megamoe``."""

from megamoe.cli import program

if __name__ == "__main__":
    program()
