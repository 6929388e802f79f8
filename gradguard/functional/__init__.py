"""The gradient as a pure function, and its derivatives."""
