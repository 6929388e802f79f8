"""`python -m gradguard.cli`."""

from gradguard.cli import main

if __name__ == "__main__":
    main()
