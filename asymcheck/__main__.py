"""`python -m asymcheck`: the command `asymcheck`."""

from asymcheck.cli import run

if __name__ == "__main__":
    run()
