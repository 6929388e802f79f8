"""Files: atomic, private, never pickled."""
