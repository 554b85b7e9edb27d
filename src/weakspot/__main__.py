"""`python -m weakspot`."""

from weakspot.cli import main

main()
