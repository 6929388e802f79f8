"""The attacker: what is assumed of it, what it sees, what it returns."""
