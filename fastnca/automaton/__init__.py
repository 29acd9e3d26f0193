"""The automaton: its rule, and the backends that run it. Nothing in here knows what sound is."""
