"""Tables, series, pixels, music: other data on the same decoder, loop and curves."""
