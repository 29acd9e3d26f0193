"""Sound: files, spectrograms, vocoders, pictures, metrics. Nothing in here knows what an automaton is."""
