"""The measurement, the score of an attack, and the summary of both: once, for everybody."""
