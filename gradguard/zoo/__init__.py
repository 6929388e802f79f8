"""Models, pictures and text to measure on."""
