"""`python -m gradguard`."""

from gradguard.cli import main

main()
