"""`python -m weakspot.cli`."""

from weakspot.cli import main

main()
